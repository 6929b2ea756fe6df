#!/usr/bin/env bash
# The torch-free program for 64-bit Arm: builds it and its tests here (preset aarch64), runs them in QEMU as processors
# without dot products, with them, and with int8 matrix products, and demands this machine's own greedy tokens of the
# same files. Prints sizes and memory; no speed, which an emulator does not have.
#   PARE_HOST=FILE   a pare-edge of this machine (default: built by the preset edge)
#   PARE_JOBS=N      parallel compilations (default: the number of cores)
#   PARE_QUICK=1     not the tests of core, eval and of the runtime beside its kernels
# Installs nothing. Exit 77 (skipped, said aloud) where compiler, libraries or QEMU are missing; 1 on any difference.
set -u
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
BUILD=$ROOT/build-aarch64
JOBS=${PARE_JOBS:-$(nproc)}
export OMP_WAIT_POLICY=passive

missing=()
need() { command -v "$1" >/dev/null || missing+=("$2"); }
need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
need qemu-aarch64-static qemu-user-static
for library in pcre2-8:pcre2 utf8proc:utf8proc xxhash:xxhash fmt:fmt gtest:gtest cpp-httplib:cpp-httplib; do
  ls /usr/lib/aarch64-linux-gnu/lib"${library%%:*}".* >/dev/null 2>&1 || missing+=("lib${library#*:}-dev:arm64")
done
ls /usr/lib/aarch64-linux-gnu/libgomp.so.1 >/dev/null 2>&1 || missing+=("libgomp1:arm64")
if [ ${#missing[@]} -gt 0 ]; then
  echo "SKIPPED: nothing was built or run for 64-bit Arm. On Debian:"
  echo "  dpkg --add-architecture arm64 && apt-get update"
  echo "  apt-get install --no-install-recommends ${missing[*]}"
  exit 77
fi

T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
FAILED=0
check() {
  local name=$1
  shift
  if "$@" >"$T/log" 2>&1; then echo "ok $name"; else
    FAILED=1
    echo "FAILED $name"
    tail -n 25 "$T/log"
  fi
}
build() {  # preset, targets
  local preset=$1
  shift
  (cd "$ROOT" && cmake --preset "$preset" && cmake --build "build-$preset" -j "$JOBS" --target "$@") >"$T/log" 2>&1 || {
    tail -n 30 "$T/log"
    exit 1
  }
}
HOST=${PARE_HOST:-$ROOT/build-edge/pare-edge}
[ -n "${PARE_HOST:-}" ] || build edge pare-edge
build aarch64 pare-edge test_core test_runtime test_eval
EDGE=$BUILD/pare-edge

# processor | its instruction sets
processors=("cortex-a72|plain, neon" "neoverse-n1|plain, neon, dotprod" "max|plain, neon, dotprod, i8mm")
on() { QEMU_CPU=$1 qemu-aarch64-static "${@:2}"; }
has_sets() {  # what a refusal of an unknown name lists
  local said
  said=$(PARE_KERNELS=none on "$1" "$EDGE" run "$T/q4.pare" -p a -n 1 -q 2>&1)
  grep -qF "this machine has: $2, found" <<<"${said//$'\n'/ }" || { echo "expected $2, found: $said"; return 1; }
}
tests() {  # processor, program, filter; how many passed is said
  local name=$1 program=$2 filter=$3 said
  said=$(on "$name" "$BUILD/tests/$program" --gtest_filter="$filter" 2>&1)
  local status=$?
  local passed=$(sed -n 's/^\[  PASSED  \] \([0-9]*\) test.*/\1/p' <<<"$said")
  if [ $status = 0 ] && [ "${passed:-0}" -gt 0 ]; then echo "ok $program on $name: $passed passed"; else
    FAILED=1
    echo "FAILED $program on $name"
    grep -E '^\[  FAILED  \]|Failure|error' <<<"$said" | sort -u | head -n 40
    tail -n 5 <<<"$said"
  fi
}

for codec in q4 q8; do
  "$HOST" export "$ROOT/examples/teacher" --to compact --codec $codec --out "$T/$codec.pare" -q >/dev/null || exit 1
done
kernels='*Kernels*:*AttentionTest*:RooflineTest*:PackedMatrix*'
for processor in "${processors[@]}"; do
  IFS='|' read -r name sets <<<"$processor"
  check "instruction sets of $name: $sets" has_sets "$name" "$sets"
  tests "$name" test_runtime "$kernels"
done
if [ -z "${PARE_QUICK:-}" ]; then
  tests max test_runtime "-$kernels"
  tests max test_core '*'
  tests max test_eval '*'
fi

ids() {  # of 64 new tokens
  "$@" -n 64 --ignore-eos --json -q >"$T/json" && tr -d ' \n' <"$T/json" | grep -oE '"ids":\[([0-9]+,){63}[0-9]+\]'
}
same_tokens() {  # processor, file, prompt
  local here there
  here=$(ids "$HOST" run "$2" -p "$3") && there=$(ids on "$1" "$EDGE" run "$2" -p "$3") || { cat "$T/json"; return 1; }
  [ "$here" = "$there" ] || { printf 'here  %s\nthere %s\n' "$here" "$there"; return 1; }
}
for codec in q4 q8; do
  for processor in "${processors[@]}"; do
    for prompt in "Once upon a time" "The cmake command" "It was a dark night, and"; do
      check "64 greedy tokens of $codec on ${processor%%|*}: $prompt" same_tokens "${processor%%|*}" "$T/$codec.pare" "$prompt"
    done
  done
done

aarch64-linux-gnu-strip -o "$T/pare-edge" "$EDGE" && strip -o "$T/pare-host" "$HOST" || exit 1
echo "pare-edge, stripped: $(stat -c %s "$T/pare-edge") bytes for aarch64, $(stat -c %s "$T/pare-host") for $(uname -m)"
peak() {  # VmHWM in kB of a command, read while it runs
  "$@" -n 400 --ignore-eos -q >/dev/null 2>&1 &
  local pid=$! seen=0 now
  while now=$(sed -n 's/^VmHWM:[^0-9]*\([0-9]*\).*/\1/p' "/proc/$pid/status" 2>/dev/null) && [ -n "$now" ]; do
    seen=$now
    sleep 0.02
  done
  wait $pid || { echo "it failed"; return 1; }
  echo "$seen"
}
echo "VmHWM of run, q4, 400 tokens: $(peak "$HOST" run "$T/q4.pare" -p a) kB here;" \
  "$(QEMU_CPU=max peak qemu-aarch64-static "$EDGE" run "$T/q4.pare" -p a) kB in QEMU, its own included"
exit $FAILED
