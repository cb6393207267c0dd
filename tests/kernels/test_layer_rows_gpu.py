"""Row passes of a decoder layer on a GPU: real tiles, in place, odd addresses, no waiting."""

from __future__ import annotations

import pytest
import torch
from layer_checks import EPS, Heads, compare_norm, compare_rotation, compare_swiglu

from polymath_fast.kernels import layer_rows

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 2), (507, 576), (4099, 3584)])
def test_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    compare_norm("triton", rows, width, dtype, "cuda")


@DTYPES
@pytest.mark.parametrize(
    "heads",
    [Heads(9, 3, 64), Heads(12, 2, 128), Heads(4, 2, 20), Heads(32, 8, 128, norms=True)],
    ids=str,
)
@pytest.mark.parametrize("rows", [0, 1, 4099])
def test_rotation(rows: int, heads: Heads, dtype: torch.dtype) -> None:
    compare_rotation("triton", rows, heads, dtype, "cuda")


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 2), (507, 8960)])
def test_swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    compare_swiglu("triton", rows, width, dtype, "cuda")


def test_odd_addresses_give_the_same_bits() -> None:
    """Pointers that are not aligned run another variant of the kernel."""
    x = torch.randn(300, 1536, device="cuda", dtype=BF16)
    weight = torch.randn(1536, device="cuda", dtype=BF16)
    room = torch.empty(x.numel() + 1, device="cuda", dtype=BF16)
    shifted = room[1:].view_as(x).copy_(x)
    found = [
        (
            layer_rows.rms_norm(given, weight, EPS, torch.empty_like(x)),
            *layer_rows.rms_norm_gradient(given, weight, EPS, x, x),
        )
        for given in (x, x, shifted)
    ]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_host_does_not_wait() -> None:
    x = torch.randn(64, 256, device="cuda", dtype=BF16)
    out = torch.empty(64, 128, device="cuda", dtype=BF16)

    def passes() -> None:
        layer_rows.rms_norm_gradient(x, x[0], EPS, x)
        layer_rows.swiglu(x, out)

    passes()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        passes()
    finally:
        torch.cuda.set_sync_debug_mode("default")
