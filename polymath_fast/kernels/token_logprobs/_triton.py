"""Log-probs and entropies of logits on a GPU: one sweep forward, one read and one write backward.

N V b bytes forward and 2 N V b backward, b being the size of a logit; 9 N V and 6 N V operations.
"""

from __future__ import annotations

from typing import Any

import torch

from polymath_fast.kernels.autograd import first_order
from polymath_fast.kernels.triton import rows


def token_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`logits` (N, V), `targets` (N,) int64 -> logprobs (N,), entropy (N,)."""
    return _TokenLogprobs.apply(logits, targets, temperature)


def gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    by_logprob: torch.Tensor,
    by_entropy: torch.Tensor | None,
) -> torch.Tensor:
    """(N, V) gradient by `logits` of a loss with these derivatives (N,) by their log-probs."""
    found = rows.statistics(logits, targets, temperature)
    out = torch.empty_like(logits)
    rows.slopes(logits, targets, found, by_logprob, by_entropy, temperature, out)
    return out


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, targets, temperature):  # noqa: ANN001
        ctx.set_materialize_grads(False)
        found = rows.statistics(logits, targets, temperature)
        ctx.save_for_backward(logits, targets, found)
        ctx.temperature = temperature
        return found[0].clone(), found[1].clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, g: torch.Tensor | None, g_entropy: torch.Tensor | None):
        logits, targets, found = ctx.saved_tensors
        if g is None and g_entropy is None:
            return None, None, None
        out = torch.empty_like(logits)
        g = torch.zeros_like(found[0]) if g is None else g
        rows.slopes(logits, targets, found, g, g_entropy, ctx.temperature, out)
        return out, None, None
