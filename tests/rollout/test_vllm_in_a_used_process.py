"""vLLM starts in a process that has already run numba kernels, as a drop-in user's may have."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SCRIPT = """
import numba
numba.njit(lambda x: x + 1)(1)
import llvmlite.binding.ffi as ffi
from polymath_fast.rollout.vllm_process import quiet_llvmlite
quiet_llvmlite()
assert not hasattr(ffi.lib, "__dict__")
numba.njit(lambda x: x * 2.0)(3.0)  # the library still answers its own names
import vllm.platforms
print("platform", vllm.platforms.current_platform.device_type)
import vllm.triton_utils
"""


def test_start_up_survives_llvmlite():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "platform" in done.stdout
