"""Flat AdamW in Triton's interpreter; `test_triton_interpreter.py` runs this file."""

from __future__ import annotations

import pytest
import torch
from adamw_checks import Settings, compare, gradients, run, start, update
from interpreter import interpret

from polymath_fast.kernels.flat_adamw import PART, _triton

interpret()


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


def test_squares_of_several_programs() -> None:
    """Their root is the norm; those of parts are the same, each in its place."""
    grad = torch.randn(90_000, generator=torch.Generator().manual_seed(0))
    grad[17] = 1e30
    whole = _triton.squares(grad, 0, len(grad))
    found = _triton.root(whole)
    assert found.item() == pytest.approx(grad.double().norm().item(), rel=1e-14)
    assert not _triton.squares(torch.empty(0), 0, 0).numel()
    assert _triton.root(_triton.squares(torch.empty(0), 0, 0)) == 0
    parts = [_triton.squares(grad, *part) for part in ((0, PART), (PART, PART), (PART, 90_000))]
    assert torch.equal(sum(parts), whole) and not parts[1].any()
    assert not parts[0][4:].any() and not parts[2][:4].any()
