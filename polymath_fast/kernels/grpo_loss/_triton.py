"""Policy loss from logits on a GPU; the gradient is computed in the forward pass.

With b bytes a logit: where coefficients are known beforehand (on-policy, no KL penalty) 2 N V b
bytes, one read and one write, as long as the rows in flight fit in the L2 cache; else 3 N V b, the
losses' own arithmetic on (N,) vectors lying between the two sweeps. 15 N V operations.
"""

from __future__ import annotations

import torch

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
    *,
    in_place: bool = False,
) -> PolicyLossOutput:
    """`logits` (N, V), `targets` (N,) int64.

    in_place: the gradient overwrites the logits, which saves their size in memory. Autograd then
    refuses to run through anything else that saved them.
    """
    values = logits.detach()
    gradient = None
    if torch.is_grad_enabled() and logits.requires_grad:
        gradient = values if in_place and _writable(logits) else torch.empty_like(values)
    temperature = spec.temperature
    early = None if gradient is None else known_beforehand(batch, spec)
    if early is not None:
        slopes = (early.coefficient, early.entropy_coefficient)
        found = rows.statistics_and_slopes(values, targets, *slopes, temperature, gradient)
    else:
        found = rows.statistics(values, targets, temperature)
    logprobs, entropy = found[0], found[1]
    terms = policy_terms(batch, logprobs, entropy, spec)
    if gradient is not None and early is None:
        slopes = (terms.coefficient, terms.entropy_coefficient)
        rows.slopes(values, targets, found, *slopes, temperature, gradient)
    if gradient is not None and gradient is values:
        torch.autograd.graph.increment_version(logits)
    loss = with_gradients(terms.loss.sum(), (logits,), (gradient,))
    return PolicyLossOutput(loss, logprobs, entropy, summarize(batch, terms, logprobs, entropy))


def _writable(logits: torch.Tensor) -> bool:
    """Whether the logits' memory can hold a gradient: not a leaf's, no entry stored twice."""
    return not logits.is_leaf and logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1]
