"""Log-probs and entropies of logits on a CPU: compiled passes over rows."""

from __future__ import annotations

from typing import Any

import torch

from polymath_fast.kernels.autograd import first_order
from polymath_fast.kernels.cpu.logits import LogitRows


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
    rows = LogitRows(logits, targets, temperature)
    rows.statistics()
    by_entropy = torch.zeros_like(by_logprob) if by_entropy is None else by_entropy
    return rows.gradient(by_logprob, by_entropy, inplace=False)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: float):
        found = LogitRows(logits, targets, temperature).statistics()
        ctx.save_for_backward(logits, targets, found)
        ctx.temperature = temperature
        return found[0].float(), found[1].float()

    @staticmethod
    @first_order
    def backward(ctx: Any, by_logprob: torch.Tensor, by_entropy: torch.Tensor):
        logits, targets, found = ctx.saved_tensors
        rows = LogitRows(logits, targets, ctx.temperature)
        rows.found = found
        return rows.gradient(by_logprob, by_entropy, inplace=False), None, None
