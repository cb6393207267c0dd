"""Inner loops of the CPU's kernels count no references to arrays."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit
from numba.core.errors import NumbaError

from polymath_fast.kernels.cpu import layers
from polymath_fast.kernels.cpu.borrowed import BORROWED


def _rotation(row_count: int = 3):
    """Arguments of the rotation of bf16 bits."""
    stacked = np.zeros((row_count, 5, 16), np.uint16)
    angles = np.zeros((row_count, 16), np.uint16)
    norms, row = np.ones((0, 16), np.float32), np.zeros(32, np.float32)
    return 0, row_count, stacked, 4, angles, angles, norms, np.float32(0), row, stacked.copy()


def test_a_borrowed_loop_has_no_counting_in_it():
    counted, borrowed = (
        njit(**options)(layers._rotate_rows.py_func)
        for options in ({"nogil": True}, BORROWED | {"cache": False})
    )
    texts = []
    for kernel in (counted, borrowed):
        kernel(*_rotation())
        texts.append(next(iter(kernel.inspect_llvm().values())))
    assert "NRT_incref" in texts[0]  # what is looked for is what numba calls it
    assert "NRT_incref" not in texts[1].replace("declare void @NRT_incref", "")


def test_a_borrower_cannot_allocate():
    @njit(**(BORROWED | {"cache": False}))
    def allocates(size):
        return np.empty(size).sum()

    with pytest.raises(NumbaError):
        allocates(3)
