"""The checks of the Triton kernels allow a head what tensor cores do, and no more."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton_checks  # noqa: E402
from triton_checks import Result, compare, logprobs_result, make_head  # noqa: E402

from polymath_fast.kernels.token_logprobs.reference import token_logprobs  # noqa: E402

FP16 = torch.float16


def as_hopper(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The product, each sum cut off to 24 bits after every 16 products: arXiv 2512.07004."""
    total = torch.zeros(out.shape, dtype=torch.float64)
    for k in range(0, left.shape[1], 16):
        total += left[:, k : k + 16].double() @ right[k : k + 16].double()
        total = (total.view(torch.int64) >> 29 << 29).view(torch.float64)
    return out.copy_(total)


@pytest.mark.parametrize("times", [1.0, 3.0])
def test_a_head_may_be_off_like_a_product_on_tensor_cores(
    times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_checks, "product", as_hopper)
    tensors = make_head(12, 6_000, 1536, FP16, "cpu", bias=True)
    zeros = torch.zeros(12)
    exact = logprobs_result("linear_logprobs", "reference", tensors, zeros, zeros)

    def run(name: str, given: triton_checks.Tensors) -> Result:
        if name != "_triton":
            return logprobs_result("linear_logprobs", name, given, zeros, zeros)
        logits = as_hopper(given["hidden"], given["weight"].T, torch.empty(12, 6_000))
        found = token_logprobs(logits + given["bias"].float(), given["targets"], 0.7)
        off = [x.double() + (times - 1) * (x - y) for x, y in zip(found, truth, strict=True)]
        return Result(*(x.float() for x in off), exact.gradients)

    wide = triton_checks.doubled(tensors)
    logits = wide["hidden"] @ wide["weight"].T + wide["bias"]
    truth = token_logprobs(logits, tensors["targets"], 0.7)
    if times <= triton_checks.OF_TORCH:
        compare(run, tensors, FP16)
    else:
        with pytest.raises(AssertionError, match="not close"):
            compare(run, tensors, FP16)
