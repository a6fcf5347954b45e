# Settings of IWSLT14 German-English; sourced by examples/common/recipe.sh.
src=de tgt=en level=sentences sizes="base" tokenized_style=lowercased

settings() {
  # fairseq's examples/translation: one GPU, 4,096 tokens an update.
  arch=transformer_iwslt_de_en
  model=(--share-decoder-input-output-embed --dropout 0.3 --weight-decay 0.0001)
  batch_tokens=4096 batch_gpus=1 average=5
  dense=(--lr 5e-4 --warmup-updates 4000 --max-update 60000 --save-interval-updates 1000)
  tune=(--lr 2e-4 --warmup-updates 200 --max-update 6000 --save-interval-updates 500)
}
