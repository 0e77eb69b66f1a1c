#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# From a fresh machine to the demo, the tests or the plots: installs what is missing (Debian, Ubuntu), builds, runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'TXT'
usage: cmake/bootstrap.sh demo [arguments of `needle_lm demo`]
       cmake/bootstrap.sh test [arguments of ctest]
       cmake/bootstrap.sh bench [arguments of Google Benchmark]
       cmake/bootstrap.sh packages [more Debian packages]    only installs
Paths in arguments are relative to the repository.
TXT
}

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

# The Debian packages, of those needed, that this machine lacks. Tools count as there when they are on the PATH.
missing_packages() {
  command -v c++ >/dev/null || echo g++
  command -v cmake >/dev/null || echo cmake
  command -v ninja >/dev/null || echo ninja-build
  if command -v dpkg-query >/dev/null; then
    local package
    for package in libeigen3-dev libgtest-dev libgmock-dev libbenchmark-dev nlohmann-json3-dev "$@"; do
      dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || echo "$package"
    done
  fi
}

install_packages() {
  local missing
  missing=$(missing_packages "$@" | xargs)
  if [ -n "$missing" ] && command -v apt-get >/dev/null && as_root true 2>/dev/null; then
    echo "Installing $missing"
    local log
    log=$(mktemp)
    # shellcheck disable=SC2086  # a list of words
    if ! { as_root apt-get update -qq &&
           as_root env DEBIAN_FRONTEND=noninteractive \
             apt-get install -y -qq --no-install-recommends $missing; } >"$log" 2>&1; then
      cat "$log"
    fi
    rm -f "$log"
    missing=$(missing_packages "$@" | xargs)
  fi
  if ! { command -v c++ && command -v ninja && cmake --list-presets; } >/dev/null 2>&1; then
    echo "Please install a C++20 compiler, CMake 3.25 or later and Ninja first (on Debian: apt-get install $missing)." >&2
    exit 1
  elif [ -n "$missing" ]; then
    echo "Not installed: $missing (CMake will fetch the libraries among them)" >&2
  fi
}

# One job a core, but no more than fit into memory: a test file takes up to 1.5 GiB to compile.
num_jobs() {
  local cores kib fit
  cores=$(getconf _NPROCESSORS_ONLN)
  if command -v nproc >/dev/null; then cores=$(nproc); fi
  kib=$(awk '/^MemAvailable/ { print $2 }' /proc/meminfo 2>/dev/null || true)
  fit=$((${kib:-$((cores * 1572864))} / 1572864))
  if [ "$fit" -lt "$cores" ]; then cores=$fit; fi
  echo $((cores > 0 ? cores : 1))
}

configure() { # [argument of cmake...]
  local log
  log=$(mktemp)
  cmake --preset release "$@" >"$log" 2>&1 || { cat "$log"; exit 1; }
  rm -f "$log"
}

build() { # [target...]
  cmake --build --preset release --parallel "$(num_jobs)" ${1:+--target "$@"}
}

command=${1:-}
[ $# = 0 ] || shift
case $command in
  demo)
    install_packages
    configure
    build needle_lm
    exec build/release/examples/needle_lm/needle_lm demo "$@"
    ;;
  test)
    install_packages
    configure -D HEADWISE_BUILD_BENCHMARKS=OFF  # no test runs them
    build
    exec ctest --preset release --parallel "$(num_jobs)" "$@"
    ;;
  bench)
    install_packages python3-matplotlib
    configure -D HEADWISE_BUILD_BENCHMARKS=ON
    build
    mkdir -p build/bench
    for program in build/release/bench/*_bench; do
      name=$(basename "$program")
      "$program" --benchmark_out="build/bench/$name.json" --benchmark_out_format=json "$@"
    done
    python=python3  # or else the system's, whose matplotlib the package is
    "$python" -c 'import matplotlib' 2>/dev/null || python=/usr/bin/python3
    "$python" bench/plot/plot.py build/bench
    ;;
  packages)
    install_packages "$@"
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac
