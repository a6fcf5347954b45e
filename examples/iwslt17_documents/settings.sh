# Settings of IWSLT17 English-German at document level; sourced by examples/common/recipe.sh.
src=en tgt=de level=documents sizes="base" tokenized_style=cased
# fairseq's default of 200 tokens would cut every longer document.
length=(--max-len-a 1.2 --max-len-b 50)

settings() {
  arch=transformer_wmt_en_de
  model=(--share-all-embeddings --dropout 0.3 --weight-decay 0.0001)
  batch_tokens=4096 batch_gpus=8 average=5
  search=(--beam 5)
  warm=(--lr 5e-4 --warmup-updates 4000 --max-update 20000 --save-interval-updates 500)
  dense=(--lr 2e-4 --warmup-updates 1000 --max-update 10000 --save-interval-updates 250)
  tune=(--lr 1e-4 --warmup-updates 200 --max-update 2000 --save-interval-updates 100)
}
