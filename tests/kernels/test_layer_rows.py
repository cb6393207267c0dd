"""Row passes of a decoder layer against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from layer_checks import EPS, Heads, compare_norm, compare_rotation, compare_swiglu

from polymath_fast.kernels import layer_rows

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS = pytest.mark.parametrize(
    ("impl", "dtype"),
    [("cpu", FP32), ("cpu", BF16), ("reference", FP32), ("reference", BF16), ("reference", FP16)],
    ids=str,
)


@KINDS
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 2), (507, 576)])
def test_norm(impl: str, rows: int, width: int, dtype: torch.dtype) -> None:
    compare_norm(impl, rows, width, dtype)


@KINDS
@pytest.mark.parametrize(
    ("rows", "heads"),
    [
        (0, Heads(2, 1, 4)),
        (1, Heads(1, 1, 2)),
        (1, Heads(1, 1, 2, norms=True)),
        (507, Heads(9, 3, 64)),
        (63, Heads(4, 2, 20, norms=True)),
    ],
    ids=str,
)
def test_rotation(impl: str, rows: int, heads: Heads, dtype: torch.dtype) -> None:
    compare_rotation(impl, rows, heads, dtype)


@KINDS
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 2), (63, 1536)])
def test_swiglu(impl: str, rows: int, width: int, dtype: torch.dtype) -> None:
    compare_swiglu(impl, rows, width, dtype)


def test_what_does_not_fit_is_named() -> None:
    x = torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"weight is \(4,\)"):
        layer_rows.rms_norm(x, torch.ones(4), EPS, x.clone())
    with pytest.raises(ValueError, match=r"strides \(1, 3\)"):
        layer_rows.rms_norm(x, torch.ones(8), EPS, torch.zeros(8, 3).t())
    with pytest.raises(ValueError, match="residual is .*bfloat16"):
        layer_rows.rms_norm_gradient(x, torch.ones(8), EPS, x, x.bfloat16())
    with pytest.raises(ValueError, match="gate_up is"):
        layer_rows.swiglu(x, torch.zeros(3, 5))


def test_heads_that_do_not_fit_are_named() -> None:
    stacked, angle = torch.zeros(3, 4, 6), torch.zeros(3, 6)
    rest = (angle, angle, (None, None), EPS)
    with pytest.raises(ValueError, match="3 queries and 1 keys need 5 heads"):
        layer_rows.rotate(stacked, (3, 1), *rest, stacked)
    norms = (angle, angle, (angle[0], angle[0]), EPS)
    with pytest.raises(ValueError, match="the gradient of heads with a norm needs both"):
        layer_rows.rotate(stacked, (2, 1), *norms, stacked)
    upstream = [torch.zeros(3, heads, 6) for heads in (2, 1, 1)]
    with pytest.raises(ValueError, match="raw is None"):
        layer_rows.rotate_gradient(None, (2, 1), *norms, upstream, stacked)
    with pytest.raises(ValueError, match="the gradient of k is"):
        layer_rows.rotate_gradient(
            None, (2, 1), *rest, [upstream[0], upstream[0], upstream[2]], stacked
        )
    with pytest.raises(ValueError, match="both do, or none"):
        layer_rows.rotate(stacked, (2, 1), angle, angle, (angle[0], None), EPS, stacked)


def test_a_cpu_has_no_float16() -> None:
    x = torch.zeros(3, 8, dtype=FP16)
    with pytest.raises(ValueError, match="float16 rows"):
        layer_rows.rms_norm(x, x[0], EPS, x.clone(), impl="cpu")
