# Settings of WMT14 English-German; sourced by examples/common/recipe.sh.
src=en tgt=de level=sentences sizes="big base" tokenized_style=compound-split

settings() {
  search=(--beam 4 --lenpen 0.6)
  case $1 in
    # fairseq's examples/scaling_nmt: 128 batches of 3,584 tokens an update, learning rate 0.001.
    big)
      arch=transformer_vaswani_wmt_en_de_big
      model=(--share-all-embeddings --dropout 0.3 --weight-decay 0.0)
      batch_tokens=3584 batch_gpus=128 average=10
      dense=(--lr 0.001 --warmup-updates 4000 --max-update 30000 --save-interval-updates 1000)
      tune=(--lr 2e-4 --warmup-updates 200 --max-update 3000 --save-interval-updates 200) ;;
    # Vaswani et al.: 100,000 updates of about 25,000 tokens.
    base)
      arch=transformer_wmt_en_de
      model=(--share-all-embeddings --dropout 0.1 --weight-decay 0.0)
      batch_tokens=3584 batch_gpus=8 average=5
      dense=(--lr 7e-4 --warmup-updates 4000 --max-update 100000 --save-interval-updates 2000)
      tune=(--lr 2e-4 --warmup-updates 500 --max-update 10000 --save-interval-updates 500) ;;
  esac
}
