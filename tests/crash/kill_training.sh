#!/bin/bash
# kill -9 at random moments of a training run, again and again until it ends: the weights and the losses are those of an
# uninterrupted run, bit for bit, and nothing stands under the final name before the end.
#   tests/crash/kill_training.sh BUILD_DIR [ROUNDS] [SEED]
set -u
BUILD=$(cd "${1:?usage: kill_training.sh BUILD_DIR [ROUNDS] [SEED]}" && pwd)
ROUNDS=${2:-4}
RANDOM=${3:-1}
PARE="$BUILD/pare"
MAKE="$BUILD/tests/make_tiny_model"
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
FAILED=0
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
"$MAKE" "$T/model" 2 128 || exit 1
"$MAKE" --text "$T/text.txt" 20 || exit 1
for i in $(seq 60); do
  printf '{"prompt": "%s and %s are", "response": " %s"}\n' $i $((i * 7 % 11)) $((i % 3))
done > "$T/examples.jsonl"

# What differs from run to run: report.json holds times, train.jsonl speed and memory.
digest() {
  (cd "$1" && find . -type f -not -name report.json -not -name train.jsonl -print0 | sort -z | xargs -0 sha256sum
   sed -E 's/"(tokens_per_second|resident_bytes)":[0-9.e+]*,?//g; s/,\}/}/g' train.jsonl | sha256sum)
}
now() { date +%s%N; }
fail() { echo "FAILED $*"; FAILED=$((FAILED + 1)); }

try() { # NAME COMMAND...
  local name=$1
  shift
  rm -rf "$T"/out*
  local begin=$(now)
  "$@" --out "$T/out" >"$T/log" 2>&1 || { fail "$name: the uninterrupted run"; tail -5 "$T/log"; return; }
  local wall=$((($(now) - begin) / 1000000)) whole=$(digest "$T/out") killed=0 round
  for ((round = 0; round < ROUNDS; ++round)); do
    rm -rf "$T"/out*
    local tries=0
    while [ ! -e "$T/out" ]; do
      tries=$((tries + 1))
      [ $tries -le 40 ] || { fail "$name: does not end"; return; }
      # Short lives most often: many of them fall into saving, which is done at every step.
      local life=$((wall / 8 + RANDOM * wall / 43690))
      [ $tries -le 8 ] || life=$((wall * 4))
      "$@" --out "$T/out" >"$T/log" 2>&1 &
      local process=$!
      ( sleep "$((life / 1000)).$(printf %03d $((life % 1000)))"; kill -9 $process ) 2>/dev/null &
      local killer=$!
      wait $process 2>/dev/null
      local code=$?
      kill $killer 2>/dev/null
      wait $killer 2>/dev/null
      case $code in
        137) killed=$((killed + 1)) ;;
        0) ;;
        *) fail "$name: exit $code after a kill"; tail -5 "$T/log"; return ;;
      esac
    done
    if [ "$(digest "$T/out" | grep -v training_state)" != "$whole" ]; then
      fail "$name: other bytes after kills"
      diff <(echo "$whole") <(digest "$T/out")
    fi
  done
  echo "$name: $ROUNDS runs killed $killed times (a run takes $wall ms)"
  [ $killed -ge "$ROUNDS" ] || fail "$name: too few kills came in time to prove anything"
}

COMMON=(--text "$T/examples.jsonl" --held-out "$T/examples.jsonl" --batch 2 --context 64 --checkpoint-minutes 0 --threads 1 --quiet)
try "finetune" "$PARE" finetune --model "$T/model" "${COMMON[@]}" --steps 700 --patience 50 --eval-every 3
try "finetune, LoRA" "$PARE" finetune --model "$T/model" "${COMMON[@]}" --steps 700 --lora-rank 4 --lr 1e-2 --adapter
try "train" "$PARE" train --model "$T/model" --text "$T/text.txt" --batch 2 --context 64 --checkpoint-minutes 0 --threads 1 \
  --quiet --steps 700
[ "$FAILED" = 0 ] && echo "every resumed run gave the bytes of an uninterrupted one"
[ "$FAILED" = 0 ]
