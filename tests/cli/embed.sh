#!/bin/bash
# Installs the embedded runtime, builds examples/embed against it as somebody else would, and runs it on an export of
# examples/teacher: the tokens of `pare-edge run`, no other libraries than the README says, none but pare's own symbols.
#   tests/cli/embed.sh BUILD_DIR [PROGRAM]      PROGRAM: pare-edge of another build
set -eu
BUILD=$(cd "${1:?usage: embed.sh BUILD_DIR [PROGRAM]}" && pwd)
EDGE=$(realpath "${2:-$BUILD/pare-edge}")
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
fail() { echo "FAILED $*"; exit 1; }
[ -x "$EDGE" ] || fail "missing $EDGE"

cmake --build "$BUILD" --target pare_embed >"$T/log" 2>&1 || { cat "$T/log"; fail "building pare_embed"; }
cmake --install "$BUILD" --prefix "$T/prefix" >"$T/log" 2>&1 || { cat "$T/log"; fail "installing"; }
library=$(find "$T/prefix" -name libpare.a)
bytes=$(stat -c %s "$library")
echo "libpare.a: $bytes bytes"
if grep -q '^CMAKE_CXX_FLAGS:.*-ffunction-sections' "$BUILD/CMakeCache.txt"; then  # as the preset embed has it
  [ "$bytes" -le 2000000 ] || fail "libpare.a has $bytes bytes, 2 MB is the limit"
fi
strange=$(nm --defined-only --extern-only "$library" | awk 'NF == 3 && $3 !~ /^pare_/ {print $3}')
[ -z "$strange" ] || fail "libpare.a defines $strange"
declared=$(grep -v typedef "$T/prefix/include/pare.h" | grep -o '^[a-z].*pare_[a-z_]*(' | grep -o 'pare_[a-z_]*(' |
  tr -d '(' | sort -u)
defined=$(nm --defined-only --extern-only "$library" | awk 'NF == 3 && $2 == "T" {print $3}' | sort -u)
[ "$declared" = "$defined" ] || fail "declared: $declared; defined: $defined"

mkdir "$T/source"
cp "$ROOT"/examples/embed/* "$T/source"
cmake -S "$T/source" -B "$T/build" -DCMAKE_PREFIX_PATH="$T/prefix" >"$T/log" 2>&1 ||
  { cat "$T/log"; fail "find_package"; }
cmake --build "$T/build" >"$T/log" 2>&1 || { cat "$T/log"; fail "building the example"; }
foreign=$(ldd "$T/build/continue" | awk '{print $1}' |
  grep -Ev '^(linux-vdso|/lib.*/ld-|libc|libm|libstdc\+\+|libgcc_s|libpcre2-8|libutf8proc|libgomp|libpthread)' || true)
[ -z "$foreign" ] || fail "the example needs $foreign"
if ! grep -q '^PARE_OPENMP:BOOL=ON' "$BUILD/CMakeCache.txt"; then
  ! ldd "$T/build/continue" | grep -q libgomp || fail "the example needs libgomp"
fi
sed 's/pare 0.1/pare 99/' "$ROOT/examples/embed/CMakeLists.txt" >"$T/source/CMakeLists.txt"
! cmake -S "$T/source" -B "$T/other" -DCMAKE_PREFIX_PATH="$T/prefix" >"$T/log" 2>&1 || fail "version 99 was found"

"$EDGE" export "$ROOT/examples/teacher" --to compact --codec q8 --out "$T/teacher.pare" --quiet >/dev/null
for prompt in "Once upon a time" "The option -o says where"; do
  "$EDGE" run "$T/teacher.pare" -p "$prompt" -n 60 --json --quiet >"$T/run.json"
  want=$(grep -o '"ids":\[[0-9,]*\]' "$T/run.json" | tr -dc '0-9, ' | tr ',' ' ')
  got=$("$T/build/continue" "$T/teacher.pare" "$prompt" 60 2>&1 >"$T/text")
  [ -n "$want" ] && [ "$(echo $want)" = "$(echo $got)" ] || fail "tokens: $got, expected $want"
done
set +e
"$T/build/continue" "$ROOT/README.md" x 1 >"$T/log" 2>&1
code=$?
set -e
[ "$code" = 3 ] && grep -q README.md "$T/log" || fail "a file that is none: exit $code, $(cat "$T/log")"
for at in $(seq 0 29); do  # errors find their way out of the linked library, whatever the place
  cp "$T/teacher.pare" "$T/bad.pare"
  chmod u+w "$T/bad.pare"
  if [ $((at % 3)) = 0 ]; then truncate -s $((at * at * 2500)) "$T/bad.pare"
  else printf '\x7f' | dd of="$T/bad.pare" bs=1 seek=$((at * at * 40)) conv=notrunc 2>/dev/null; fi
  code=0
  "$T/build/continue" "$T/bad.pare" "Once upon" 2 >/dev/null 2>"$T/log" || code=$?
  [ "$code" -le 5 ] || fail "damage $at: exit $code, $(cat "$T/log")"
done
echo "ok: $(head -c 60 "$T/text")"
