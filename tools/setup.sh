#!/usr/bin/env bash
# Makes the environment that `make train` and `make test` use.   usage: tools/setup.sh VENV [EXTRA]
#
#   EXTRA            optional dependencies of pyproject.toml, e.g. dev
#   PYTHON           interpreter to start from (default: the newest python3.x from 3.11 on)
#   FA3_TRAIN_CUDA   auto: build the kernels if an NVIDIA GPU is visible; 1: build; 0: do not
#   FA3_TRAIN_JOBS   compiler processes at once (default 2; each takes up to 2 GB)
#
# Without a visible GPU torch comes as its CPU build. Running it again is cheap and changes only
# what is out of date.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:?usage: tools/setup.sh VENV [EXTRA]}
extra=${2:-}
cuda=${FA3_TRAIN_CUDA:-auto}
say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 || true)
case $cuda in
  auto) if [ -n "$gpu" ]; then cuda=1; else cuda=0; fi ;;
  0 | 1) ;;
  *) die "FA3_TRAIN_CUDA must be auto, 0 or 1, got '$cuda'" ;;
esac

if [ ! -x "$venv/bin/python" ]; then
  for python in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    recent "$python" && break
    python=
  done
  [ -n "$python" ] || die "Python 3.11 or newer is needed; name one with PYTHON=/path/to/python"
  say "environment $venv from $("$python" --version)"
  "$python" -m venv "$venv" || die "python3 -m venv failed (on Debian: apt-get install python3-venv)"
fi
python=$venv/bin/python
pip=("$python" -m pip --disable-pip-version-check -qq)

constraint=()
if [ -z "$gpu" ]; then
  constraint=(-c constraints-cpu.txt)
  pin=$(grep '^torch==' constraints-cpu.txt)
  if ! "$python" -c 'import torch' 2>/dev/null; then
    say "no NVIDIA GPU visible: installing the CPU build of $pin"
    # Where pip is set up already, else PyTorch's own index of CPU builds.
    "${pip[@]}" install "$pin+cpu" 2>/dev/null ||
      "${pip[@]}" install --index-url https://download.pytorch.org/whl/cpu "$pin" ||
      die "found no CPU build of $pin"
  fi
fi

# No ahead-of-time ops of DeepSpeed; in-place, so that the checkout is what runs.
say "installing fa3_train${extra:+[$extra]} from this checkout"
FA3_TRAIN_CUDA=0 DS_BUILD_OPS=0 "${pip[@]}" install "${constraint[@]}" \
  --config-settings=editable.mode=inplace -e ".${extra:+[$extra]}"

if [ "$cuda" = 0 ]; then
  say "kernels not built (${gpu:-no NVIDIA GPU visible}; FA3_TRAIN_CUDA=1 builds them):" \
    "attention runs on the sdpa and reference backends"
  exit 0
fi
"${pip[@]}" install "cmake>=3.24" ninja
if ! command -v nvcc >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ]; then
  say "no nvcc on this machine: taking the compiler from wheels"
  FA3_TRAIN_CUDA=0 "${pip[@]}" install "${constraint[@]}" --config-settings=editable.mode=inplace -e '.[build]'
fi
say "building the kernels, build/libfa3_train.so (up to 5 minutes on 2 cores)"
PATH="$(cd "$venv/bin" && pwd):$PATH"
# A build folder remembers the ninja of an environment that may be gone.
ninja=$(sed -n 's/^CMAKE_MAKE_PROGRAM:[^=]*=//p' build/CMakeCache.txt 2>/dev/null || true)
if [ -n "$ninja" ] && [ ! -x "$ninja" ]; then
  say "build/ was made with $ninja, which is gone: configuring again"
  rm -rf build/CMakeCache.txt build/CMakeFiles
fi
cmake -B build -G Ninja -DFA3_REQUIRE_CUDA=ON -DPython3_EXECUTABLE="$(command -v python)" >/dev/null
cmake --build build -j "${FA3_TRAIN_JOBS:-2}"
say "kernels built: build/libfa3_train.so"
