#!/bin/bash
# kill -9 at random points of a run, then the same command: at most one block is redone, the result is byte-identical
# to an uninterrupted run and nothing partial ever stands under the final name.
#   tests/crash/kill_resume.sh BUILD_DIR [KILLS] [SEED]
# KILLS: of a quantize run; a compress run, most of which is opening and measuring, gets a third of them.
set -u
BUILD=$(cd "${1:?usage: kill_resume.sh BUILD_DIR [KILLS] [SEED]}" && pwd)
KILLS=${2:-20}
RANDOM=${3:-1}
PARE="$BUILD/pare"
MAKE="$BUILD/tests/make_tiny_model"
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
FAILED=0
LAYERS=6

# Same bits are promised at any thread count where feasible; what is proven here is resume, so the count is fixed.
export OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive
"$MAKE" "$T/model" $LAYERS 256 || exit 1
"$MAKE" --text "$T/text.txt" 60 || exit 1

# Times and memory differ from run to run: report.json holds them, and report.html after that heading.
digest() {
  (cd "$1" && find . -type f -not -name report.json -not -name report.html -print0 | sort -z | xargs -0 sha256sum
   [ ! -e report.html ] || sed '/^<h2>Times and memory/,$d' report.html | sha256sum)
}
now() { date +%s%N; }
fail() {
  echo "FAILED $*"
  FAILED=$((FAILED + 1))
}

# Every block says "Block N: ..." when it has been computed, just before it is made durable. So a run that goes on after
# a kill may begin with the last block the killed run spoke of, and never with one before it.
blocks() { grep -ao '^Block [0-9]*' "$1" | cut -d' ' -f2; }
check_redone() { # NAME KILLED_LOG RESUMED_LOG
  local done=$(blocks "$2") again=$(blocks "$3") twice
  [ "$(printf '%s\n' $done $again | sort -un | wc -l)" = $LAYERS ] ||
    fail "$1: blocks computed by both runs together: $(printf '%s ' $done $again)"
  twice=$(($(printf '%s\n' $done $again | grep -c .) - LAYERS))
  [ "$twice" -le "$MOST" ] || MOST=$twice
  [ "$twice" -le 1 ] || fail "$1: $twice blocks were redone (killed: $(echo $done), resumed: $(echo $again))"
  [ -z "$done" ] || RESUMED=$((RESUMED + 1))
}

# try NAME KILLS COMMAND...: uninterrupted once, then KILLS times killed at a random moment and repeated.
try() {
  local name=$1 kills=$2
  shift 2
  rm -rf "$T"/out*
  local begin=$(now)
  if ! "$@" --out "$T/out" >"$T/log" 2>&1; then
    fail "$name: the uninterrupted run ended with an error"
    tail -5 "$T/log"
    return
  fi
  local wall=$((($(now) - begin) / 1000000)) whole=$(digest "$T/out") killed=0 counted=0 i
  MOST=0 RESUMED=0
  [ "$(blocks "$T/log" | wc -l)" = $LAYERS ] || fail "$name: the log does not tell its $LAYERS blocks"
  mv "$T/out" "$T/whole"
  for ((i = 0; i < kills; ++i)); do
    rm -rf "$T"/out*
    local delay=$((wall * (100 + RANDOM % 900) / 1000))
    "$@" --out "$T/out" >"$T/killed" 2>&1 &
    local process=$!
    sleep "$((delay / 1000)).$(printf %03d $((delay % 1000)))"
    kill -9 "$process" 2>/dev/null
    wait "$process" 2>/dev/null
    local code=$?
    [ "$code" = 137 ] && killed=$((killed + 1))
    if [ "$code" = 137 ] && [ -e "$T/out" ] && [ "$(digest "$T/out")" != "$whole" ]; then
      fail "$name: after a kill at $delay ms a partial result stands under the final name"
    fi
    if [ ! -e "$T/out" ]; then
      if ! "$@" --out "$T/out" >"$T/resumed" 2>&1; then
        fail "$name: the repeated command ended with an error after a kill at $delay ms"
        tail -5 "$T/resumed"
        continue
      fi
      check_redone "$name, killed at $delay of $wall ms" "$T/killed" "$T/resumed"
      counted=$((counted + 1))
    fi
    if [ "$(digest "$T/out")" != "$whole" ]; then
      fail "$name: other bytes after a kill at $delay of $wall ms"
      diff <(echo "$whole") <(digest "$T/out") | head -6
    fi
  done
  rm -rf "$T/whole"
  echo "$name: $killed of $kills runs killed before their end (a run takes $wall ms), $RESUMED of $counted resumed after" \
       "their first block, at most $MOST blocks redone"
  [ "$killed" -ge $((kills / 2)) ] || fail "$name: too few kills came in time to prove anything"
  [ "$RESUMED" -ge 1 ] || fail "$name: no kill came after the first block"
}

try "quantize" "$KILLS" "$PARE" quantize --model "$T/model" --text "$T/text.txt"
try "compress" $(((KILLS + 2) / 3)) "$PARE" compress --model "$T/model" --text "$T/text.txt" --eval-text "$T/text.txt" \
  --eval-max-tokens 500
[ "$FAILED" = 0 ] && echo "every resumed run gave the bytes of an uninterrupted one"
[ "$FAILED" = 0 ]
