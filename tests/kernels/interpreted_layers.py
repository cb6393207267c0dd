"""Row passes of a decoder layer in Triton's interpreter; `test_triton_interpreter.py` runs this."""

from __future__ import annotations

import pytest
import torch
from interpreter import hurry
from layer_checks import ROUNDING, Heads, compare_norm, compare_rotation, compare_swiglu
from triton_checks import TRUNCATION

from polymath_fast.kernels import dispatch
from polymath_fast.kernels.layer_rows import _triton

hurry()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU go to the kernels."""
    monkeypatch.setattr(dispatch, "resolve", lambda *_: _triton)
    monkeypatch.setitem(ROUNDING, BF16, TRUNCATION)


@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [(0, 8, FP32), (1, 2, FP32), (70, 96, FP32), (33, 576, BF16), (5, 64, FP16)],
)
def test_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    compare_norm("triton", rows, width, dtype)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("rows", "queries", "keys", "size", "dtype"),
    [
        (0, 2, 1, 4, FP32),
        (1, 1, 1, 2, FP32),
        (37, 3, 1, 20, FP32),
        (19, 9, 3, 64, BF16),
        (3, 4, 4, 8, FP16),
    ],
)
def test_rotation(rows, queries, keys, size, dtype, norms: bool) -> None:
    compare_rotation("triton", rows, Heads(queries, keys, size, norms), dtype)


@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [(0, 8, FP32), (1, 2, FP32), (3, 1500, FP32), (2, 2048, BF16), (3, 40, FP16)],
)
def test_swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    compare_swiglu("triton", rows, width, dtype)
