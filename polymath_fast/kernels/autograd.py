"""What the operators' autograd functions share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass whose slopes are constants: differentiating it again is an error.

    torch's once_differentiable lets a second derivative pass in silence where the incoming gradient
    needs none.
    """

    @functools.wraps(backward)
    def call(ctx: Any, *incoming: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this operator has no second derivative: call backward or autograd.grad "
                "without create_graph=True"
            )
        return backward(ctx, *incoming)

    return call
