"""Log-probs and entropies of an LM head on a CPU.

What the gradient will be multiplied with is not known in the forward pass, so the backward pass
computes the logits of the rows that have a gradient again: four matrix products, not three.
"""

from __future__ import annotations

from typing import Any

import torch

from polymath_fast.kernels.autograd import first_order
from polymath_fast.kernels.cpu.head import Head
from polymath_fast.kernels.cpu.head_gradient import head_gradients


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`hidden` (N, H), `weight` (V, H), `targets` (N,) int64 -> logprobs (N,), entropy (N,)."""
    return _LinearLogprobs.apply(hidden, weight, targets, bias, temperature)


def gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    by_logprob: torch.Tensor,
    by_entropy: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, ...]:
    """By hidden, weight and bias, of a loss with these derivatives (N,) by their log-probs."""
    given = (hidden, weight, bias, targets, temperature)
    return head_gradients(*given, by_logprob, by_entropy, needs)[:3]


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, targets, bias, temperature):
        ctx.save_for_backward(hidden, weight, targets, bias)
        ctx.temperature = temperature
        head = Head(hidden, weight, bias, targets, temperature)
        head.visit()
        return head.logprobs, head.entropy

    @staticmethod
    @first_order
    def backward(ctx: Any, by_logprob: torch.Tensor, by_entropy: torch.Tensor):
        hidden, weight, targets, bias = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        d_hidden, d_weight, d_bias = gradients(
            hidden, weight, targets, bias, ctx.temperature, by_logprob, by_entropy, needs
        )
        return d_hidden, d_weight, None, d_bias, None
