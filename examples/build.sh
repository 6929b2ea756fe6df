#!/usr/bin/env bash
# Installs what is missing and builds pare into build/. Run by quickstart.sh and tests/run.sh; works on its own too.
#   PARE_NO_INSTALL=1   installs nothing and lists what is missing instead
#   PARE_BUILD=DIR      another build folder (default: build)
#   PARE_JOBS=N         parallel compilations (default: the number of cores)
#   CMAKE_PREFIX_PATH   where to look for another LibTorch first
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=${PARE_BUILD:-$root/build}

# package | a file that shows it is there | what it is for
needs=(
  "g++|/usr/bin/g++|the compiler"
  "cmake|/usr/bin/cmake|the build, and its manual as text for the quickstart"
  "ninja-build|/usr/bin/ninja|the build"
  "pkg-config|/usr/bin/pkg-config|finding libraries"
  "ccache|/usr/bin/ccache|fast rebuilds"
  "libeigen3-dev|/usr/include/eigen3/Eigen/Core|factorisations in double precision"
  "libhdf5-dev|/usr/include/hdf5/serial/hdf5.h|the logit cache"
  "libcli11-dev|/usr/include/CLI/CLI.hpp|command line"
  "libgtest-dev|/usr/include/gtest/gtest.h|tests"
  "libgmock-dev|/usr/include/gmock/gmock.h|tests"
  "libcpp-httplib-dev|/usr/include/httplib.h|pare serve"
  "nlohmann-json3-dev|/usr/include/nlohmann/json.hpp|JSON"
  "libyaml-cpp-dev|/usr/include/yaml-cpp/yaml.h|recipes"
  "libpcre2-dev|/usr/include/pcre2.h|the tokenizer's patterns"
  "libsentencepiece-dev|/usr/include/sentencepiece_processor.h|tokenizer.model of older models"
  "libutf8proc-dev|/usr/include/utf8proc.h|Unicode normalisation"
  "libxxhash-dev|/usr/include/xxhash.h|hashes"
  "libgloo-dev|/usr/include/gloo/rendezvous/store.h|training on several machines"
  "libfmt-dev|/usr/include/fmt/format.h|text formatting"
)
# Another LibTorch given through CMAKE_PREFIX_PATH replaces Debian's.
torch_given=0
IFS=':;' read -ra prefixes <<<"${CMAKE_PREFIX_PATH:-}"
for prefix in "${prefixes[@]}"; do
  if [ -n "$prefix" ] && [ -e "$prefix/share/cmake/Torch/TorchConfig.cmake" ]; then torch_given=1; fi
done
if [ "$torch_given" = 0 ]; then
  needs+=("libtorch-dev|/usr/include/torch/csrc/api/include/torch/torch.h|LibTorch: models, autograd, training"
    "libopenblas-dev|/usr/lib/x86_64-linux-gnu/libopenblas.so|fast matrix products under LibTorch")
fi

missing=() reasons=()
for need in "${needs[@]}"; do
  IFS='|' read -r package file reason <<<"$need"
  # Libraries live under another triplet on other machines; the package database decides there.
  if [ ! -e "$file" ] && ! { [[ $file == */x86_64-linux-gnu/* ]] && [ "$(uname -m)" != x86_64 ] && dpkg -s "$package" >/dev/null 2>&1; }; then
    missing+=("$package")
    reasons+=("  $package: $reason")
  fi
done
if [ ${#missing[@]} -gt 0 ]; then
  echo "pare needs ${#missing[@]} Debian packages that are not installed:"
  printf '%s\n' "${reasons[@]}"
  if [ -n "${PARE_NO_INSTALL:-}" ]; then
    echo "PARE_NO_INSTALL is set: nothing was installed. Install them with:"
    echo "  apt-get install --no-install-recommends ${missing[*]}"
    exit 1
  fi
  as_root=()
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "run this as root or install sudo; it needs apt-get install ${missing[*]}"; exit 1; }
    as_root=(sudo)
  fi
  echo "Installing them with apt-get."
  log=$(mktemp)
  if ! { "${as_root[@]}" apt-get update && "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 20 "$log"
    echo "apt-get failed; the whole log is in $log"
    exit 1
  fi
  rm -f "$log"
fi

# A build folder remembers its source, generator and LibTorch; a moved or foreign one would fail obscurely.
if [ -f "$build/CMakeCache.txt" ] && ! grep -qxF "CMAKE_HOME_DIRECTORY:INTERNAL=$root" "$build/CMakeCache.txt"; then
  echo "$build was configured for another source folder; remove it or set PARE_BUILD"
  exit 1
fi
echo "Building into $build (the first time takes several minutes)."
cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE="${PARE_BUILD_TYPE:-Release}" >"$build.configure.log" 2>&1 || {
  tail -n 30 "$build.configure.log"
  exit 1
}
rm -f "$build.configure.log"
# Sources that see LibTorch take over 1 GB each to compile.
memory_gb=$(awk '/MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)
jobs=${PARE_JOBS:-$(nproc)}
if [ "$jobs" -gt $((memory_gb / 2 + 1)) ]; then jobs=$((memory_gb / 2 + 1)); fi
cmake --build "$build" -j "$jobs" --target "${@:-all}"
