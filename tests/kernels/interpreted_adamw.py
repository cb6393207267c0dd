"""Flat AdamW in Triton's interpreter; `test_triton_interpreter.py` runs this file."""

from __future__ import annotations

import pytest
import torch
from adamw_checks import Settings, compare, gradients, run, start, update
from interpreter import hurry

from polymath_fast.kernels.flat_adamw import _triton

hurry()


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(max_grad_norm=0.5, grad_scale=64.0, zero_grad=False),
        Settings(eps=1e-30, betas=(0.0, 0.9)),
    ],
    ids=["plain", "clipped", "small-eps"],
)
def test_flat_adamw(settings) -> None:
    compare("_triton", settings, gradients(6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_flat_adamw_of_other_live_dtypes(dtype) -> None:
    ours = run("_triton", start(dtype), gradients(2), Settings())
    assert torch.equal(ours["live"][3:2900], ours["master"][3:2900].to(dtype))
    assert torch.equal(ours["live"][4500:], start(dtype)["live"][4500:])


@pytest.mark.parametrize("remainder", [False, True])
def test_flat_adamw_of_a_gradient_that_is_not_finite(remainder) -> None:
    state = run("_triton", start(remainder=remainder), gradients(1), Settings())
    before = {name: tensor.clone() for name, tensor in state.items()}
    grad = gradients(1)[0]
    grad[4400] = torch.nan
    assert update("_triton", state, grad, 1, Settings()).isnan()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    assert not grad[3:2900].any() and grad[4500:].any()


def test_grad_norm_of_several_programs() -> None:
    grad = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    grad[17] = 1e30
    found = _triton.grad_norm(grad)
    assert found.item() == pytest.approx(grad.double().norm().item(), rel=1e-14)
    assert _triton.grad_norm(torch.empty(0)) == 0
