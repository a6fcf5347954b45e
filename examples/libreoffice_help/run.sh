#!/usr/bin/env bash
# Attention Pruning on LibreOffice's help: dense training -> attention statistics -> masks -> fine-tuning -> BLEU.
#
#   run.sh [--pair "en de"] [--size full|small] [--systems "per-kind ..."] [--share X] [--jobs N] [--out DIR] [--data DIR]
#          [--dense-updates N] [--tune-updates N] [--scratch]
#
# --size     full: 4 + 4 layers of 256 in half precision, for a GPU; small: a small model on the short segments,
#            for two CPU cores.
#            Default: full where torch sees a GPU.
# --systems  which masks to make (see `masks_of`); each is scored without and with fine-tuning. Default: per-kind.
# --share    share of the pairs that masks prune (effective sparsity). Default: 0.5.
# --jobs     how many systems run at the same time (they share the GPU). Default: 1.
# --out      folder of the run; a second run with the same settings skips finished stages.
# --data     folder of prepare.sh; made if it does not exist.
# --dense-updates, --tune-updates   length of training and fine-tuning, instead of the size's own.
# --scratch  also train a new model under each system's masks, as long as the dense one, as the paper does.
#
# Needs the package installed (scripts/setup.sh). Writes results.json and prints its table, then a report in report/.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../../scripts/stages.sh"
source "$here/../common/systems.sh"

pair="en de" size="" systems="per-kind" share=0.5 jobs=1 run="" data="" dense_updates="" tune_updates="" scratch=""
while [ $# -gt 0 ]; do
  case $1 in
    --pair | --size | --systems | --share | --jobs | --out | --data | --dense-updates | --tune-updates)
      [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; } ;;&
    --pair) pair=$2 ;;
    --size) size=$2 ;;
    --systems) systems=$2 ;;
    --share) share=$2 ;;
    --jobs) jobs=$2 ;;
    --out) run=$2 ;;
    --data) data=$2 ;;
    --dense-updates) dense_updates=$2 ;;
    --tune-updates) tune_updates=$2 ;;
    --scratch) scratch=1; shift; continue ;;
    *) echo "error: unknown option $1; see the head of $0" >&2; exit 2 ;;
  esac
  shift 2
done
read -r src tgt <<< "$pair"
if [ -z "$size" ]; then
  size=$(python -c 'import torch; print("full" if torch.cuda.is_available() else "small")')
fi
run=${run:-$here/runs/$src-$tgt-$size}
plugin=(--user-dir "$here/../../ap_fairseq")

case $size in
  full)
    # Small and pre-norm: transformer_iwslt_de_en learns little from 48,000 pairs (README).
    sizes=(--arch transformer --encoder-layers 4 --decoder-layers 4 --encoder-embed-dim 256 --encoder-ffn-embed-dim 1024
      --encoder-attention-heads 4 --decoder-attention-heads 4 --encoder-normalize-before --decoder-normalize-before
      --dropout 0.2 --fp16 --max-tokens 8192 --validate-interval 3 --save-interval 3 --num-workers 2)
    dense_updates=${dense_updates:-4000} tune_updates=${tune_updates:-400}
    dense_lr=(--lr 2e-3 --warmup-updates 600) tune_lr=(--lr 6e-4 --warmup-updates 60)
    prepare=(--out "${data:=$here/data/$src-$tgt}")
    device=(--fp16) record_batch=(--max-tokens 16384) generate_batch=(--max-tokens 24000) ;;
  small)
    sizes=(--arch transformer --encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 128 --encoder-ffn-embed-dim 512
      --encoder-attention-heads 4 --decoder-attention-heads 4 --encoder-normalize-before --decoder-normalize-before
      --dropout 0.1 --cpu --max-tokens 3000 --num-workers 0)
    # Give freed memory back to torch, not to the system: a fifth faster, as no page is faulted in twice.
    export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296
    dense_updates=${dense_updates:-2500} tune_updates=${tune_updates:-250}
    dense_lr=(--lr 3e-3 --warmup-updates 300) tune_lr=(--lr 1e-3 --warmup-updates 30)
    # Short segments and a small dictionary: what a small model learns in minutes.
    prepare=(--out "${data:=$here/data/$src-$tgt-short}" --max-words 12 --bpe-size 2000)
    device=(--cpu --num-workers 0) record_batch=(--max-tokens 6000) generate_batch=(--max-tokens 4000) ;;
  *) echo "error: --size $size is not full or small" >&2; exit 2 ;;
esac

bin=$data/data-bin/sentences
training=(--task translation --source-lang "$src" --target-lang "$tgt" --share-all-embeddings
  --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay 1e-4 --lr-scheduler inverse_sqrt
  --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --seed 1
  --no-epoch-checkpoints --log-format json --log-interval 50 --skip-invalid-size-inputs-valid-test)

# A batch size multiple of 1, because with its default of 8 fairseq drops up to 7 test sentences without a word.
translate() {  # NAME CHECKPOINT
  stage "$1.generate" fairseq-generate "$bin" "${plugin[@]}" --path "$2" --source-lang "$src" --target-lang "$tgt" \
    --beam 5 --remove-bpe sentencepiece --required-batch-size-multiple 1 "${generate_batch[@]}" "${device[@]}"
}

train_under_masks() {  # NAME.WAY FLAGS...
  local stage_name=$1
  shift
  stage "$stage_name" fairseq-train "$bin" "${plugin[@]}" "${training[@]}" "${sizes[@]/#transformer/pruned_transformer}" "$@"
}

system() {  # NAME
  local name=$1 flags
  flags=$(masks_of "$name" "$share")
  # shellcheck disable=SC2086  (flags are words)
  stage "$name.masks" ap-masks "$run/stats.safetensors" $flags -o "$run/$name.safetensors" --overwrite
  stage "$name.apply" ap-apply "$run/dense/checkpoint_best.pt" --attention-masks "$run/$name.safetensors" --data "$bin" \
    -o "$run/$name.untuned.pt" --overwrite
  translate "$name.untuned" "$run/$name.untuned.pt"
  train_under_masks "$name.tune" "${tune_lr[@]}" --max-update $tune_updates \
    --finetune-from-model "$run/dense/checkpoint_best.pt" --attention-masks "$run/$name.safetensors" --save-dir "$run/$name.tuned"
  translate "$name.tuned" "$run/$name.tuned/checkpoint_best.pt"
  [ -n "$scratch" ] || return 0
  train_under_masks "$name.train" "${dense_lr[@]}" --max-update $dense_updates --attention-masks "$run/$name.safetensors" \
    --save-dir "$run/$name.scratch"
  translate "$name.scratch" "$run/$name.scratch/checkpoint_best.pt"
}

for name in $systems; do masks_of "$name" "$share" > /dev/null; done
[ -e "$data/counts.json" ] || stage prepare bash "$here/prepare.sh" "$src" "$tgt" "${prepare[@]}"
stage dense.train fairseq-train "$bin" "${training[@]}" "${sizes[@]}" "${dense_lr[@]}" --max-update $dense_updates \
  --save-dir "$run/dense"
# shellcheck disable=SC2046,SC2086  (names and flags are words)
stage dense.record ap-record "$bin" --path "$run/dense/checkpoint_best.pt" --subset train \
  -o "$run/stats.safetensors" --overwrite "${record_batch[@]}" "${device[@]}" --log-format simple \
  $(recorded_for $systems)
translate dense "$run/dense/checkpoint_best.pt"

# One that fails does not end the others, which write to the same folder as the next run would.
running=0 failed=0
for name in $systems; do
  system "$name" &
  running=$((running + 1))
  if [ "$running" -ge "$jobs" ]; then
    wait -n || failed=$((failed + 1))
    running=$((running - 1))
  fi
done
while [ "$running" -gt 0 ]; do
  wait -n || failed=$((failed + 1))
  running=$((running - 1))
done
[ "$failed" = 0 ] || { echo "error: $failed systems failed; the same command does what is missing" >&2; exit 1; }

scored=("dense=$run/logs/dense.generate.log,$run/dense/checkpoint_best.pt")
for name in $systems; do
  scored+=("$name.untuned=$run/logs/$name.untuned.generate.log,$run/$name.untuned.pt")
  scored+=("$name.tuned=$run/logs/$name.tuned.generate.log,$run/$name.tuned/checkpoint_best.pt")
  [ -z "$scratch" ] || scored+=("$name.scratch=$run/logs/$name.scratch.generate.log,$run/$name.scratch/checkpoint_best.pt")
done
ap-evaluate "${scored[@]}" --reference "$data/sentences/test.$tgt" --stages "$run/stages" --significance bootstrap -o "$run/results.json" --overwrite
echo "results: $run/results.json"

masks=()
for name in $systems; do masks+=("$run/$name.safetensors"); done
# Not a stage: cheap, and always of the scores just written.
ap-report --stats "$run/stats.safetensors" ${masks[@]:+--masks "${masks[@]}"} --results "$run/results.json" \
  -o "$run/report" --overwrite
