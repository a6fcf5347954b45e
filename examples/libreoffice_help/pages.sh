#!/usr/bin/env bash
# Page-level translation: a sentence-level model trained on with sentences, chunks and pages, and how well it translates
# the same test pages as pages, in chunks, and segment by segment.
#
#   pages.sh --dense CHECKPOINT --data DIR --out DIR [--updates N] [--fairseq-train "FLAGS"] [--cpu]
#
# --dense          the sentence-level model to start from, trained on data-bin/sentences of the same data.
# --updates        length of the training on the mix. Default: 4000.
# --fairseq-train  the model's sizes and the optimizer, as the dense model was trained.
# --cpu            no GPU and no half precision.
#
# Finished stages are skipped. Prints d-BLEU (BLEU of whole pages) for each length, for the mixed model and, segment by
# segment, for the sentence-level one: take the longest length at which the mixed model is within a few points of that,
# and compare masks there with sweeps/pages.yaml.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../../scripts/stages.sh"

dense="" data="" run="" updates=4000
device=(--fp16)
plugin=(--user-dir "$here/../../ap_fairseq")  # allow-lists what checkpoints hold, for torch 2.6 and later
training="--arch transformer_iwslt_de_en --share-all-embeddings --dropout 0.3 --optimizer adam --adam-betas (0.9,0.98)
  --weight-decay 1e-4 --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 400 --max-tokens 16384 --num-workers 2
  --criterion label_smoothed_cross_entropy --label-smoothing 0.1"
while [ $# -gt 0 ]; do
  case $1 in
    --dense | --data | --out | --updates | --fairseq-train)
      [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; } ;;&
    --dense) dense=$2; shift 2 ;;
    --data) data=$2; shift 2 ;;
    --out) run=$2; shift 2 ;;
    --updates) updates=$2; shift 2 ;;
    --fairseq-train) training=$2; shift 2 ;;
    --cpu) device=(--cpu); shift ;;
    *) echo "error: unknown option $1; see the head of $0" >&2; exit 2 ;;
  esac
done
for name in dense data run; do
  [ -n "${!name}" ] || { echo "error: --${name/run/out} is missing; see the head of $0" >&2; exit 2; }
done
mkdir -p "$run"

stage mix python "$here/page_mix.py" "$data"
read -r src tgt < <(python -c 'import json, sys; o = json.load(open(sys.argv[1]))["options"]
print(*(o[side].replace("-", "_") for side in ("source", "target")))' "$data/counts.json")
# shellcheck disable=SC2086  (flags are words)
stage train fairseq-train "$data/data-bin/mix" "${plugin[@]}" --task translation --source-lang "$src" --target-lang "$tgt" $training \
  "${device[@]}" --finetune-from-model "$dense" --max-update "$updates" --save-dir "$run/mixed" --no-epoch-checkpoints \
  --seed 1 --log-format json --log-interval 50 --skip-invalid-size-inputs-valid-test

evaluate() {  # NAME SUBSET CHECKPOINT
  stage "$1.generate" fairseq-generate "$data/data-bin/mix" "${plugin[@]}" --path "$3" --source-lang "$src" --target-lang "$tgt" \
    --gen-subset "$2" --beam 5 --remove-bpe sentencepiece --required-batch-size-multiple 1 --max-tokens 12000 \
    --max-len-a 1.5 --max-len-b 50 --num-workers 0 "${device[@]}"
  stage "$1.evaluate" ap-evaluate "$1=$run/logs/$1.generate.log,$3" --reference "$data/mix/$2.$tgt" --documents "$data/mix/$2.pages" \
    --separator "<sep>" --metrics bleu chrf -o "$run/$1.json" --overwrite
}

subsets=(test $(cd "$data/mix" && ls test[0-9]*.pages | sed 's/\.pages//' | sort -V))
for subset in "${subsets[@]}"; do evaluate "mixed.$subset" "$subset" "$run/mixed/checkpoint_best.pt"; done
evaluate "sentence.${subsets[-1]}" "${subsets[-1]}" "$dense"
python - "$run" <<'PYTHON'
import json, pathlib, sys

print(f"{'system':<20}{'lines':>7}{'d-BLEU':>8}{'d-chrF2':>9}{'s-BLEU':>8}{'equal segments':>16}")
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    result = json.loads(path.read_text(encoding="utf-8"))["systems"][0]
    print(
        f"{result['system']:<20}{result['sentences']:>7}{result['d_bleu']:>8.2f}{result['d_chrf']:>9.2f}"
        f"{result['s_bleu']:>8.2f}{result['lines_with_equal_segments']:>16.1%}"
    )
PYTHON
