#!/usr/bin/env bash
# RoBERTa on a task of GLUE, dense and with a share of its encoder self-attention pruned:
#
#   glue.sh TASK DATA_BIN PRETRAINED OUT [SHARE [FLAG ...]]
#
# TASK is MNLI, QNLI, QQP, RTE, SST-2, MRPC, CoLA or STS-B; DATA_BIN comes from fairseq's preprocess_GLUE_tasks.sh, PRETRAINED is the
# model.pt of its roberta.large; SHARE is 0.5 by default; FLAGs go to both trainings. In the environment, ARCH=roberta_base is for
# the base model, and an empty FP16 for single precision.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/python.sh"
if [ $# -lt 4 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
task=$1 data=$2 pretrained=$3 out=$4 share=${5:-0.5}
shift $(($# > 5 ? 5 : $#))
arch=${ARCH:-roberta_large}
read -ra fp16 <<<"${FP16---fp16 --fp16-init-scale 4 --threshold-loss-scale 1 --fp16-scale-window 128}"

case $task in # classes, batch, learning rate, updates of ten epochs and of the warm-up: fairseq's README.glue.md
    MNLI) sizes="3 32 1e-5 123873 7432" ;;
    QNLI) sizes="2 32 1e-5 33112 1986" ;;
    QQP) sizes="2 32 1e-5 113272 28318" ;;
    RTE) sizes="2 16 2e-5 2036 122" ;;
    SST-2) sizes="2 32 1e-5 20935 1256" ;;
    MRPC) sizes="2 16 1e-5 2296 137" ;;
    CoLA) sizes="2 16 1e-5 5336 320" ;;
    STS-B) sizes="1 16 2e-5 3598 214" ;;
    *)
        echo "glue.sh: error: TASK $task is not MNLI, QNLI, QQP, RTE, SST-2, MRPC, CoLA or STS-B" >&2
        exit 2
        ;;
esac
read -r classes batch rate updates warmup <<<"$sizes"
best=(--best-checkpoint-metric accuracy --maximize-best-checkpoint-metric)
if [ "$task" = STS-B ]; then best=(--best-checkpoint-metric loss --regression-target); fi

train() { # NAME ARCH FLAG ...: fine-tunes the pretrained model
    fairseq-train "$data" --user-dir "$(python3 -m ap_fairseq)" --arch "$2" --save-dir "$out/$1" --restore-file "$pretrained" \
        --task sentence_prediction --criterion sentence_prediction --init-token 0 --separator-token 2 --max-positions 512 \
        --reset-optimizer --reset-dataloader --reset-meters --required-batch-size-multiple 1 \
        --num-classes "$classes" --batch-size "$batch" --max-tokens 4400 --dropout 0.1 --attention-dropout 0.1 \
        --optimizer adam --adam-betas '(0.9, 0.98)' --adam-eps 1e-06 --weight-decay 0.1 --clip-norm 0.0 \
        --lr-scheduler polynomial_decay --lr "$rate" --total-num-update "$updates" --warmup-updates "$warmup" --max-epoch 10 \
        --no-epoch-checkpoints "${best[@]}" "${fp16[@]}" "${@:3}" 2>&1 | tee "$out/$1.log"
}

mkdir -p "$out"
train dense "$arch" "$@" # needs --user-dir, too: torch 2.6 and later refuse fairseq's RoBERTa checkpoints otherwise
ap-record "$data" --path "$out/dense/checkpoint_best.pt" --importance --batch-size "$batch" "${fp16[@]:0:1}" --overwrite \
    -o "$out/stats.safetensors"
ap-masks "$out/stats.safetensors" --encoder-self "$share" --criterion importance --smooth 32 --overwrite \
    -o "$out/masks.safetensors"
train pruned "pruned_$arch" --attention-masks "$out/masks.safetensors" "$@"
