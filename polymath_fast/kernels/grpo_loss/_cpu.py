"""Policy loss from logits on a CPU: one pass for the loss, one for the gradient."""

from __future__ import annotations

from typing import Any

import torch

from polymath_fast.kernels.autograd import first_order, note_written, writable
from polymath_fast.kernels.cpu.logits import LogitRows
from polymath_fast.kernels.policy_loss import (
    PolicyBatch,
    PolicyLossOutput,
    PolicyLossSpec,
    policy_terms,
    summarize,
)
from polymath_fast.kernels.policy_loss.packed import steady_sum


def grpo_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    batch: PolicyBatch,
    spec: PolicyLossSpec,
    inplace: bool,
) -> PolicyLossOutput:
    """`logits` (N, V), `targets` (N,) int64."""
    rows = LogitRows(logits.detach(), targets, spec.temperature)
    logprobs, entropy, _, _ = rows.statistics().float()
    terms = policy_terms(batch, logprobs, entropy, spec)
    by_entropy = terms.entropy_coefficient
    by_entropy = torch.zeros_like(logprobs) if by_entropy is None else by_entropy
    loss = _WithRows.apply(
        steady_sum(terms.loss),
        logits,
        targets,
        rows.found,
        terms.coefficient,
        by_entropy,
        spec,
        inplace and writable(logits),
    )
    metrics = summarize(batch, terms, logprobs, entropy)
    return PolicyLossOutput(loss, logprobs, entropy, metrics)


class _WithRows(torch.autograd.Function):
    """A scalar whose derivatives by the log-probs and entropies of `logits` are known."""

    @staticmethod
    def forward(ctx: Any, loss, logits, targets, found, by_logprob, by_entropy, spec, inplace):
        ctx.save_for_backward(logits, targets, found, by_logprob, by_entropy)
        ctx.temperature, ctx.inplace = spec.temperature, inplace
        return loss.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: torch.Tensor):
        logits, targets, found, by_logprob, by_entropy = ctx.saved_tensors
        rows = LogitRows(logits, targets, ctx.temperature)
        rows.found = found
        gradient = rows.gradient(by_logprob * upstream, by_entropy * upstream, inplace=ctx.inplace)
        if ctx.inplace:
            note_written([logits])
        return None, gradient, None, None, None, None, None, None
