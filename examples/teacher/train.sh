#!/bin/sh
# Trains the tiny teacher of this folder: a 1.7 M parameter Llama-style model on CMake's manual and novels.
#   usage: train.sh PARE NOVELS OUT       NOVELS: folder of English novels as .txt; about 45 million tokens are drawn
# TOKENS (51200000: 30 for each parameter), EVAL_EVERY (250 steps of 8,192 tokens). Interrupted, it continues when run
# again. On two cores with AVX-512 and BF16 instructions to itself it runs at about 20,000 tokens a second.
set -eu
[ $# -eq 3 ] || { echo "usage: $0 PARE NOVELS OUT" >&2; exit 2; }
pare=$1 novels=$2 out=$3
here=$(cd "$(dirname "$0")" && pwd)
text=$out.text
[ -d "$text" ] || "$here/make_text.sh" "$text" "$novels"
[ -d "$out.tokenizer" ] || "$pare" train-tokenizer --text "$text/manual" --text "$text/novels_sample" \
  --vocab-size 2048 --out "$out.tokenizer"
exec "$pare" train --config "$here/architecture.json" --tokenizer "$out.tokenizer" --out "$out" \
  --text "$text/manual=12" --text "$text/novels=88" \
  --held-out "$text/manual_held_out" --held-out "$text/novels_held_out" \
  --tokens "${TOKENS:-51200000}" --batch 16 --context 512 --lr 3e-3 --min-lr-ratio 0.01 --warmup 0.02 --weight-decay 0.1 \
  --precision bf16 --dtype bfloat16 --eval-every "${EVAL_EVERY:-250}" --eval-tokens 32768 --final-eval-tokens 131072 \
  --checkpoint-minutes 2 --seed 1
