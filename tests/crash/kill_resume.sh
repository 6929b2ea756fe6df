#!/bin/bash
# kill -9 at random points of a run, then the same command: the result is byte-identical to an uninterrupted run and
# nothing partial ever stands under the final name.
#   tests/crash/kill_resume.sh BUILD_DIR [KILLS] [SEED]
set -u
BUILD=$(cd "${1:?usage: kill_resume.sh BUILD_DIR [KILLS] [SEED]}" && pwd)
KILLS=${2:-20}
RANDOM=${3:-1}
PARE="$BUILD/pare"
MAKE="$BUILD/tests/make_tiny_model"
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
FAILED=0

# Same bits are promised at any thread count where feasible; what is proven here is resume, so the count is fixed.
export OMP_NUM_THREADS=2
"$MAKE" "$T/model" 6 256 || exit 1
"$MAKE" --text "$T/text.txt" 60 || exit 1

digest() { (cd "$1" && find . -type f -not -name report.json -print0 | sort -z | xargs -0 sha256sum); }
now() { date +%s%N; }

# try NAME OUT COMMAND...: uninterrupted once, then KILLS times killed at a random moment and repeated.
try() {
  local name=$1
  shift
  rm -rf "$T"/out*
  local begin=$(now)
  if ! "$@" --out "$T/out" >"$T/log" 2>&1; then
    echo "FAILED $name: the uninterrupted run ended with an error"
    tail -5 "$T/log"
    FAILED=$((FAILED + 1))
    return
  fi
  local wall=$((($(now) - begin) / 1000000)) whole=$(digest "$T/out") killed=0 i
  mv "$T/out" "$T/whole"
  for ((i = 0; i < KILLS; ++i)); do
    rm -rf "$T"/out*
    # Spread over the run; the first fifth of a short run is loading libraries, so some kills come before any work.
    local delay=$((wall * (RANDOM % 1000) / 1000))
    "$@" --out "$T/out" >"$T/log" 2>&1 &
    local process=$!
    sleep "$((delay / 1000)).$(printf %03d $((delay % 1000)))"
    kill -9 "$process" 2>/dev/null
    wait "$process" 2>/dev/null
    local code=$?
    [ "$code" = 137 ] && killed=$((killed + 1))
    if [ "$code" = 137 ] && [ -e "$T/out" ] && [ "$(digest "$T/out")" != "$whole" ]; then
      echo "FAILED $name: after a kill at $delay ms a partial result stands under the final name"
      FAILED=$((FAILED + 1))
    fi
    # `compress` finds its own finished run; a single stage has an existing output to complain about.
    if [ ! -e "$T/out" ] && ! "$@" --out "$T/out" >"$T/log" 2>&1; then
      echo "FAILED $name: the repeated command ended with an error after a kill at $delay ms"
      tail -5 "$T/log"
      FAILED=$((FAILED + 1))
      continue
    fi
    if [ "$(digest "$T/out")" != "$whole" ]; then
      echo "FAILED $name: other bytes after a kill at $delay of $wall ms"
      diff <(echo "$whole") <(digest "$T/out") | head -6
      FAILED=$((FAILED + 1))
    fi
  done
  rm -rf "$T/whole"
  echo "$name: $killed of $KILLS runs were killed before their end (a run takes $wall ms)"
  if [ "$killed" -lt $((KILLS / 2)) ]; then
    echo "FAILED $name: too few kills came in time to prove anything"
    FAILED=$((FAILED + 1))
  fi
}

try "quantize" "$PARE" quantize --model "$T/model" --text "$T/text.txt"
try "compress" "$PARE" compress --model "$T/model" --text "$T/text.txt" --eval-text "$T/text.txt"
[ "$FAILED" = 0 ] && echo "every resumed run gave the bytes of an uninterrupted one"
[ "$FAILED" = 0 ]
