"""Products of layers that share their input, against float64."""

from __future__ import annotations

import pytest
import torch
from closeness import relative_error

from polymath_fast.kernels import dense

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPU = pytest.mark.gpu
CASES = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        *(pytest.param("cpu", dtype, id=f"cpu-{dtype}") for dtype in (BF16, FP32)),
        *(pytest.param("cuda", t, id=f"cuda-{t}", marks=GPU) for t in (BF16, FP16, FP32)),
    ],
)
ROUNDING = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 1e-6}
SUMMED = 1e-6
"""relative error of sums in float32; rounding to half precision would make 1e-4 at least"""
ROWS, WIDTH, OUTPUTS = 300, 96, (64, 32, 32)
GAPS = pytest.mark.parametrize("gap", [0, 8, 1], ids=["side by side", "apart", "odd addresses"])


def layers(device: str, dtype: torch.dtype, gap: int) -> list[torch.Tensor]:
    """Weights (A, H) in one tensor, `gap` elements before each of them."""
    flat = torch.randn(sum(OUTPUTS) * WIDTH + gap * len(OUTPUTS)).to(device, dtype)
    found, start = [], 0
    for outputs in OUTPUTS:
        start += gap
        found.append(flat[start : start + outputs * WIDTH].view(outputs, WIDTH))
        start += outputs * WIDTH
    return found


@CASES
@GAPS
def test_outputs_and_the_gradient_of_the_input(device: str, dtype: torch.dtype, gap: int) -> None:
    weights = layers(device, dtype, gap)
    x, upstream = (torch.randn(ROWS, n).to(device, dtype) for n in (WIDTH, sum(OUTPUTS)))
    biases = [torch.randn(n).to(device, dtype) for n in OUTPUTS]
    whole, bias = torch.cat(weights).double(), torch.cat(biases).double()
    assert relative_error(dense.linear(x, weights), x.double() @ whole.T) < ROUNDING[dtype]
    found = dense.linear(x, weights, biases)
    assert relative_error(found, x.double() @ whole.T + bias) < 2 * ROUNDING[dtype]
    found = dense.input_gradient(upstream, weights, "test")
    # where weights lie apart each product is rounded before the next one is added
    assert relative_error(found, upstream.double() @ whole) < 2 * ROUNDING[dtype]


@CASES
@GAPS
def test_gradients_of_weights_add_up_in_float32(device: str, dtype: torch.dtype, gap: int) -> None:
    weights, totals = layers(device, dtype, gap), layers(device, FP32, gap)
    held = False
    for weight, total in zip(weights, totals, strict=True):
        total.fill_(torch.nan)
        weight.gradient_sink = lambda total=total: (total, held)
    truth = torch.zeros(sum(OUTPUTS), WIDTH, dtype=torch.float64, device=device)
    for held in (False, True):  # noqa: B007 - the sinks look at it
        x, upstream = (torch.randn(ROWS, n).to(device, dtype) for n in (WIDTH, sum(OUTPUTS)))
        assert dense.weight_gradients(upstream, x, weights) == [None] * len(weights)
        truth += upstream.double().T @ x.double()
        assert relative_error(torch.cat(totals), truth) < SUMMED
