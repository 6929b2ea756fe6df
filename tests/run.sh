#!/usr/bin/env bash
# Installs what is missing, builds into build/ and runs all fast tests. PARE_SLOW=1 runs the slow ones as well;
# further arguments go to ctest. PARE_NO_INSTALL, PARE_BUILD, PARE_JOBS: see examples/build.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=${PARE_BUILD:-$root/build}
bash "$root/examples/build.sh"
export OMP_WAIT_POLICY=passive  # spinning threads of parallel tests starve each other
if [ -n "${PARE_SLOW:-}" ]; then
  ctest --test-dir "$build" --output-on-failure "$@"
else
  ctest --test-dir "$build" --output-on-failure -LE slow "$@"
fi
