"""Operators under no_grad, inference_mode, autocast, torch.func and in a second backward pass."""

from __future__ import annotations

import pytest
import torch
from operator_inputs import (
    BF16,
    FP32,
    OPERATORS,
    call,
    gradient,
    impls,
    main_input,
    make,
    operators,
)
from torch import Tensor


@operators
@impls
def test_who_wants_a_gradient(op: str, impl: str) -> None:
    given, name = make(op), main_input(op)
    logprobs, scalar = call(op, given, impl=impl)
    assert not scalar.requires_grad
    leaf = given[name].requires_grad_()
    with torch.no_grad():
        silent, scalar = call(op, {**given, name: leaf}, impl=impl)
    assert not scalar.requires_grad and torch.equal(silent, logprobs)
    with torch.inference_mode():
        silent, _ = call(op, {**given, name: leaf}, impl=impl)
        assert torch.equal(silent, logprobs)


@operators
@pytest.mark.parametrize("impl", ["cpu"])
def test_second_derivatives_are_refused(op: str, impl: str) -> None:
    given, name = make(op), main_input(op)
    given[name].requires_grad_()
    _, scalar = call(op, given, impl=impl)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(scalar, given[name], create_graph=True)


@operators
def test_transforms_of_torch_func_are_refused(op: str) -> None:
    given, name = make(op), main_input(op)

    def scalar(rows: Tensor) -> Tensor:
        return call(op, given | {name: rows})[1]

    with pytest.raises(RuntimeError, match=rf"{op} does not run inside of torch.func"):
        torch.func.grad(scalar)(given[name])
    with pytest.raises(RuntimeError, match=rf"{op} does not run inside of torch.func"):
        torch.func.vmap(scalar)(given[name][None])


@operators
@impls
def test_autocast(op: str, impl: str) -> None:
    """A head multiplies in the narrow dtype, as a linear layer would; logits are what they are."""
    given, name = make(op), main_input(op)
    with torch.autocast("cpu", dtype=BF16):
        logprobs, found = gradient(op, given, impl=impl)
    narrow = {n: t.to(BF16) if n in ("hidden", "weight") else t for n, t in given.items()}
    expected, _ = gradient(op, narrow, impl=impl)
    assert logprobs.dtype == FP32 and torch.equal(logprobs, expected)
    assert found.dtype == given[name].dtype


@impls
def test_a_second_backward_pass(impl: str) -> None:
    for op in OPERATORS:
        given, name = make(op), main_input(op)
        given[name].requires_grad_()
        _, scalar = call(op, given, impl=impl)
        first, second = (
            torch.autograd.grad(scalar, given[name], retain_graph=True)[0] for _ in range(2)
        )
        assert torch.equal(first, second)
