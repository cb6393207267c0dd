"""How the CPU's kernels are compiled: no references counted in inner loops, nothing stale kept."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
from numba import njit
from numba.core.errors import NumbaError

from polymath_fast.kernels.cpu import jit, layers
from polymath_fast.kernels.cpu.jit import BORROWED


def _rotation(row_count: int = 3):
    """Arguments of the rotation of bf16 bits."""
    stacked = np.zeros((row_count, 5, 16), np.uint16)
    angles = np.zeros((row_count, 16), np.uint16)
    norms, row = np.ones((0, 16), np.float32), np.zeros(32, np.float32)
    return 0, row_count, stacked, 4, angles, angles, norms, np.float32(0), row, stacked.copy()


def test_a_borrowed_loop_has_no_counting_in_it():
    counted, borrowed = (
        njit(**options)(layers._rotate_rows.py_func) for options in ({"nogil": True}, BORROWED)
    )
    texts = []
    for kernel in (counted, borrowed):
        kernel(*_rotation())
        texts.append(next(iter(kernel.inspect_llvm().values())))
    assert "NRT_incref" in texts[0]  # what is looked for is what numba calls it
    assert "NRT_incref" not in texts[1].replace("declare void @NRT_incref", "")


def test_a_borrower_cannot_allocate():
    @njit(**BORROWED)
    def allocates(size):
        return np.empty(size).sum()

    with pytest.raises(NumbaError):
        allocates(3)


INNER = """
from own.jit import njit

@njit()
def inner():
    return {}
"""
OUTER = """
from own.inner import inner
from own.jit import njit

@njit()
def outer():
    return inner()

print(outer())
"""


def test_what_is_kept_is_as_new_as_all_sources(tmp_path):
    """numba by itself looks at `outer` alone and prints 1 for ever."""
    folder = tmp_path / "own"
    folder.mkdir()
    shutil.copy(jit.__file__, folder)
    (folder / "outer.py").write_text(OUTER)
    for number in (1, 2):
        (folder / "inner.py").write_text(INNER.format(number))
        run = [sys.executable, "-c", "import own.outer"]
        for _ in range(2):  # the second one finds it compiled
            child = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
            assert child.stdout.split() == [str(number)], child.stderr
