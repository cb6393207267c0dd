"""Policy loss from logits on a GPU: at most two sweeps over the logits.

With b bytes a logit: where coefficients are known beforehand (on-policy, no KL penalty) 2 N V b
bytes, one read and one write, as long as the rows in flight fit in the L2 cache; the gradient is
there when the forward pass ends. Else 3 N V b: the losses' own arithmetic, on (N,) vectors, lies
between a sweep forward and a sweep backward. 15 N V operations.
"""

from __future__ import annotations

from typing import Any

import torch

from polymath_fast.kernels.autograd import first_order, note_written, writable
from polymath_fast.kernels.policy_loss import (
    PolicyBatch,
    PolicyLossOutput,
    PolicyLossSpec,
    policy_terms,
    summarize,
)
from polymath_fast.kernels.triton import rows
from polymath_fast.kernels.triton.autograd import with_gradients
from polymath_fast.kernels.triton.coefficients import known_beforehand


def grpo_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    batch: PolicyBatch,
    spec: PolicyLossSpec,
    inplace: bool,
) -> PolicyLossOutput:
    """`logits` (N, V), `targets` (N,) int64."""
    values = logits.detach()
    inplace = inplace and writable(logits)
    early = None
    if torch.is_grad_enabled() and logits.requires_grad:
        early = known_beforehand(batch, spec)
    if early is not None:
        gradient = values if inplace else torch.empty_like(values)
        slopes = (early.coefficient, early.entropy_coefficient)
        found = rows.statistics_and_slopes(values, targets, *slopes, spec.temperature, gradient)
    else:
        found = rows.statistics(values, targets, spec.temperature)
    logprobs, entropy = found[0], found[1]
    terms = policy_terms(batch, logprobs, entropy, spec)
    metrics = summarize(batch, terms, logprobs, entropy)
    if early is None:
        slopes = (terms.coefficient, terms.entropy_coefficient)
        loss = _WithSlopes.apply(
            terms.loss.sum(), logits, targets, found, *slopes, spec.temperature, inplace
        )
        return PolicyLossOutput(loss, logprobs, entropy, metrics)
    if inplace:
        note_written([logits])
    loss = with_gradients(terms.loss.sum(), (logits,), (gradient,))
    return PolicyLossOutput(loss, logprobs, entropy, metrics)


class _WithSlopes(torch.autograd.Function):
    """A scalar whose derivatives by log-prob and entropy are known; the sweep back is to come."""

    @staticmethod
    def forward(ctx: Any, loss, logits, targets, found, g, g_entropy, temperature, inplace):  # noqa: ANN001
        ctx.save_for_backward(logits, targets, found, g, g_entropy)
        ctx.temperature, ctx.inplace = temperature, inplace
        return loss.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: torch.Tensor):
        logits, targets, found, g, g_entropy = ctx.saved_tensors
        out = logits if ctx.inplace else torch.empty_like(logits)
        g_entropy = None if g_entropy is None else g_entropy * upstream
        rows.slopes(logits, targets, found, g * upstream, g_entropy, ctx.temperature, out)
        if ctx.inplace:
            note_written([logits])
        return None, out, None, None, None, None, None, None
