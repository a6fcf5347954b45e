# Settings of WMT14 English-French; sourced by examples/common/recipe.sh.
src=en tgt=fr level=sentences sizes="big base" tokenized_style=cased

settings() {
  search=(--beam 4 --lenpen 0.6)
  case $1 in
    # fairseq's examples/scaling_nmt with the dropout of its En-Fr model, for eight times the data of En-De.
    big)
      arch=transformer_vaswani_wmt_en_fr_big
      model=(--share-all-embeddings --dropout 0.1 --weight-decay 0.0)
      batch_tokens=3584 batch_gpus=128 average=10
      dense=(--lr 0.001 --warmup-updates 4000 --max-update 80000 --save-interval-updates 1000)
      tune=(--lr 2e-4 --warmup-updates 200 --max-update 5000 --save-interval-updates 250) ;;
    base)
      arch=transformer_wmt_en_de
      model=(--share-all-embeddings --dropout 0.1 --weight-decay 0.0)
      batch_tokens=3584 batch_gpus=8 average=5
      dense=(--lr 7e-4 --warmup-updates 4000 --max-update 200000 --save-interval-updates 2000)
      tune=(--lr 2e-4 --warmup-updates 500 --max-update 10000 --save-interval-updates 500) ;;
  esac
}
