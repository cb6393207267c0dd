"""A loss whose gradients were computed together with it."""

from __future__ import annotations

from typing import Any

import torch

from polymath_fast.kernels.autograd import first_order
from polymath_fast.kernels.triton.scaling import scale_in_place


def with_gradients(
    loss: torch.Tensor,
    inputs: tuple[torch.Tensor | None, ...],
    gradients: tuple[torch.Tensor | None, ...],
) -> torch.Tensor:
    """`loss` (0-d), differentiable by `inputs` whose `gradients` are there; None = not wanted.

    The gradients are handed out, not copied, so they can be used once.
    """
    return _WithGradients.apply(list(gradients), loss, *inputs)


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor | None], loss: torch.Tensor, *inputs: Any):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: torch.Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the gradients of this loss were used up by an earlier backward pass; compute the "
                "loss again, or call the operator with impl='reference'"
            )
        scaled = [None if g is None else scale_in_place(g, upstream) for g in gradients]
        return None, None, *scaled
