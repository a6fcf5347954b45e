#!/usr/bin/env bash
# The stages of the WMT and IWSLT examples; their scripts run it as `recipe.sh FOLDER STAGE [options]`.
#
# Stages, in order; each needs those before it, `run` does all, and what is done is skipped:
#   prepare        download, clean, SentencePiece, data-bin
#   train_dense    the dense model, and the average of its last checkpoints
#   record         attention statistics of the dense model on its training data
#   prune          masks, and the dense model under them without training
#   train_pruned   fine-tuning under the masks, and the average of its last checkpoints
#   evaluate       translation and scores: results.json, results.md, results.tex
#
# Options:
#   --size NAME       model and training length, see settings.sh of the data set; `tiny` tries the scripts on a CPU
#   --variant NAME    training data, where data.toml has several
#   --systems NAMES   masks: importance per-kind encoder_self decoder_self cross random window percentile all-kept;
#                     default: per-kind
#   --share X         share of the pairs that masks prune (effective sparsity); default: 0.5
#   --sample N        record N training sentences instead of all
#   --seed N          of training; default: 1
#   --gpus N          default: all that torch sees; the batch of an update stays the same. 0: on the CPU
#   --tokenized-bleu  also score as old tables do (needs sacremoses)
#   --data DIR, --archives DIR, --out DIR   folders of the data, of downloads, and of the run
#   --bpe-size N, --valid-every N, --document-tokens N   for prepare, instead of data.toml's
set -euo pipefail
set_folder=$(cd "$1" && pwd) goal=$2
shift 2
common=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$common/../../scripts/stages.sh"
source "$common/systems.sh"

size="" variant="" systems=per-kind share=0.5 sample="" seed=1 gpus="" tokenized="" data="" run="" prepare_options=()
while [ $# -gt 0 ]; do
  case $1 in
    --tokenized-bleu) tokenized=yes; shift; continue ;;
    --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --size | --variant | --systems | --share | --sample | --seed | --gpus | --data | --archives | --out | --bpe-size | \
      --valid-every | --document-tokens)
      [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; } ;;&
    --size) size=$2 ;;
    --variant) variant=$2 ;;
    --systems) systems=$2 ;;
    --share) share=$2 ;;
    --sample) sample=$2 ;;
    --seed) seed=$2 ;;
    --gpus) gpus=$2 ;;
    --data) data=$2 ;;
    --out) run=$2 ;;
    --archives | --bpe-size | --valid-every | --document-tokens) prepare_options+=("$1" "$2") ;;
    *) echo "error: unknown option $1; $goal.sh --help lists the options" >&2; exit 2 ;;
  esac
  shift 2
done
gpus=${gpus:-$(python -c 'import torch; print(torch.cuda.device_count())')}

# -- settings: `settings.sh` sets src, tgt, level, sizes, tokenized_style, and for each size the variables below ----------
length=()  # of translations
source "$set_folder/settings.sh"
size=${size:-${sizes%% *}}
case " $sizes tiny " in
  *" $size "*) ;;
  *) echo "error: --size $size is unknown; $(basename "$set_folder") has $sizes tiny" >&2; exit 2 ;;
esac
training=(--task translation --source-lang "$src" --target-lang "$tgt" --optimizer adam --adam-betas '(0.9, 0.98)'
  --clip-norm 0.0 --lr-scheduler inverse_sqrt --warmup-init-lr 1e-07 --criterion label_smoothed_cross_entropy
  --label-smoothing 0.1 --seed "$seed" --no-epoch-checkpoints --log-format json --log-interval 100
  --skip-invalid-size-inputs-valid-test --required-batch-size-multiple 1)
search=(--beam 5) precision=(--fp16) workers=2
if [ "$size" = tiny ]; then
  arch=transformer
  model=(--encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64
    --encoder-attention-heads 2 --decoder-attention-heads 2 --share-all-embeddings)
  precision=() workers=0 batch_tokens=1500 batch_gpus=1 average=2 search=(--beam 2) length=(--max-len-b 20)
  # Short intervals, as fairseq saves no checkpoint_EPOCH_UPDATE.pt where an epoch ends.
  dense=(--lr 3e-3 --warmup-updates 10 --max-update 14 --save-interval-updates 4)
  warm=(--lr 3e-3 --warmup-updates 10 --max-update 8 --save-interval-updates 2)
  tune=(--lr 1e-3 --warmup-updates 4 --max-update 8 --save-interval-updates 2)
else
  settings "$size"
fi
[ "$gpus" -gt 0 ] && device=("${precision[@]}") || device=(--cpu)
ranks=$((gpus > 1 ? gpus : 1))
if [ $((batch_gpus % ranks)) -ne 0 ]; then
  echo "error: --gpus $gpus does not divide the $batch_gpus batches of an update of --size $size" >&2
  exit 2
fi
batch=(--max-tokens "$batch_tokens" --update-freq $((batch_gpus / ranks)) --distributed-world-size "$ranks"
  --num-workers "$workers" "${device[@]}")

name=$size${variant:+-$variant}
data=${data:-$set_folder/data/${variant:-default}}
run=${run:-$set_folder/runs/$name-seed$seed}
bin=$data/data-bin/$level
plugin=(--user-dir "$common/../../ap_fairseq")
for system in $systems; do masks_of "$system" "$share" > /dev/null; done

# -- stages ---------------------------------------------------------------------------------------------------------------

needs() {  # FILE STAGE: what an earlier stage makes
  [ -e "$1" ] || { echo "error: $1 does not exist; run $set_folder/$2.sh with the same options first" >&2; exit 1; }
}

average_last() {  # FOLDER: the mean of the last checkpoints -> average.pt
  stage "$(basename "$1").average" ap-average "$1" --last "$average" -o "$1/average.pt" --overwrite
}

train() {  # STAGE ARCH FOLDER OPTIONS...: fairseq-train; a second call continues an interrupted training
  local name=$1 arch=$2 folder=$3
  shift 3
  stage "$name" fairseq-train "$bin" "${plugin[@]}" --arch "$arch" "${model[@]}" "${training[@]}" "${batch[@]}" \
    --keep-interval-updates "$average" --save-dir "$folder" "$@"
}

prepare() {
  stage prepare python "$common/prepare_corpus.py" "$set_folder" --out "$data" ${variant:+--variant "$variant"} \
    "${prepare_options[@]}"
}

train_dense() {
  needs "$data/counts.json" prepare
  local start=()
  if [ "$level" = documents ]; then
    # Trained on documents from the beginning, a plain transformer does not learn to attend: start from sentences.
    bin=$data/data-bin/sentences train warm.train "$arch" "$run/warm" "${warm[@]}"
    average_last "$run/warm"
    start=(--finetune-from-model "$run/warm/average.pt")
  fi
  train dense.train "$arch" "$run/dense" "${dense[@]}" "${start[@]}"
  average_last "$run/dense"
}

record() {
  needs "$run/dense/average.pt" train_dense
  # shellcheck disable=SC2046,SC2086  (names and flags are words)
  stage dense.record ap-record "$bin" --path "$run/dense/average.pt" --subset train ${sample:+--sample "$sample"} \
    -o "$run/stats.safetensors" --overwrite --max-tokens "$batch_tokens" --num-workers "$workers" \
    --distributed-world-size "$ranks" "${device[@]}" --log-format simple $(recorded_for $systems)
}

prune() {
  needs "$run/stats.safetensors" record
  local system flags
  for system in $systems; do
    flags=$(masks_of "$system" "$share")
    # shellcheck disable=SC2086  (flags are words)
    stage "$system.masks" ap-masks "$run/stats.safetensors" $flags -o "$run/$system.safetensors" --overwrite
    stage "$system.apply" ap-apply "$run/dense/average.pt" --attention-masks "$run/$system.safetensors" --data "$bin" \
      -o "$run/$system.untuned.pt" --overwrite
  done
}

train_pruned() {
  local system
  for system in $systems; do
    needs "$run/$system.safetensors" prune
    train "$system.tune" "pruned_$arch" "$run/$system.tuned" "${tune[@]}" \
      --finetune-from-model "$run/dense/average.pt" --attention-masks "$run/$system.safetensors"
    average_last "$run/$system.tuned"
  done
}

generate_shard() {  # NAME CHECKPOINT SHARD, on a GPU of its own; CUDA_VISIBLE_DEVICES may name them
  local visible shard=$3
  IFS=, read -r -a visible <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((ranks - 1)))}"
  # With its default multiple of 8, fairseq drops up to 7 sentences without a word; --num-shards it ignores.
  CUDA_VISIBLE_DEVICES=${visible[$shard]:-} stage "$1.generate.$shard" fairseq-generate "$bin" "${plugin[@]}" \
    --path "$2" --source-lang "$src" --target-lang "$tgt" --gen-subset test --remove-bpe sentencepiece \
    --required-batch-size-multiple 1 --max-tokens "$batch_tokens" --distributed-world-size "$ranks" \
    --distributed-rank "$shard" --num-workers "$workers" "${search[@]}" "${length[@]}" "${device[@]}"
}

translate() {  # NAME CHECKPOINT: adds the system to `scored`; fairseq-generate shares its work by shards of the data
  local shard logs="" shards=()
  for ((shard = 0; shard < ranks; shard++)); do
    generate_shard "$1" "$2" "$shard" &
    shards+=($!)
    logs+=${logs:+:}$run/logs/$1.generate.$shard.log
  done
  for shard in "${!shards[@]}"; do wait "${shards[$shard]}" && unset "shards[$shard]"; done
  [ "${#shards[@]}" = 0 ] || { echo "error: ${#shards[@]} shards of $1 failed" >&2; return 1; }
  scored+=("$1=$logs,$2")
}

evaluate() {
  local system scored=() options=(--by-length) reference=$data/text/test.$tgt
  if [ "$level" = documents ]; then
    reference=$data/documents/test.$tgt
    options=(--by-length 100 200 300 400 --separator '<sep>' --documents "$data/documents/test.talks")
  fi
  [ -z "$tokenized" ] || options+=(--tokenized-bleu "$tokenized_style" --language "$tgt")
  translate dense "$run/dense/average.pt"
  for system in $systems; do
    needs "$run/$system.tuned/average.pt" train_pruned
    translate "$system.untuned" "$run/$system.untuned.pt"
    translate "$system.tuned" "$run/$system.tuned/average.pt"
  done
  ap-evaluate "${scored[@]}" --reference "$reference" --metrics bleu chrf ter --significance bootstrap \
    "${options[@]}" --stages "$run/stages" -o "$run/results.json" --overwrite
  ap-evaluate --markdown "$run/results.json" > "$run/results.md"
  ap-evaluate --latex "$run/results.json" > "$run/results.tex"
  echo "results: $run/results.json, $run/results.md, $run/results.tex"
}

run() {  # one after the other, not joined by &&, which would let a stage go on after a failed command
  prepare
  train_dense
  record
  prune
  train_pruned
  evaluate
}

mkdir -p "$run"
"$goal"
