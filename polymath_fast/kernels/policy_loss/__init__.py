"""Policy losses: one table from which every fused operator takes its loss and its coefficients.

Every policy loss of the family (GRPO, DAPO, Dr. GRPO, GSPO, CISPO, ...) sees the model only through
the log-prob of each sampled token, so its gradient is one number a token, g = d loss / d logprob,
times the gradient of that log-prob. `prepare` gathers what is known before the forward pass,
`policy_terms` turns log-probs into loss and g, `summarize` into metrics.
"""

from __future__ import annotations

from typing import Any

import torch

from polymath_fast.kernels import checks, dispatch
from polymath_fast.kernels.autograd import first_order
from polymath_fast.kernels.policy_loss import compiled
from polymath_fast.kernels.policy_loss.batch import PolicyBatch, prepare
from polymath_fast.kernels.policy_loss.corrections import importance_weights
from polymath_fast.kernels.policy_loss.input_checks import check_logprobs, given_spec
from polymath_fast.kernels.policy_loss.metrics import summarize
from polymath_fast.kernels.policy_loss.output import PolicyLossOutput
from polymath_fast.kernels.policy_loss.packed import steady_sum
from polymath_fast.kernels.policy_loss.spec import PolicyLossSpec
from polymath_fast.kernels.policy_loss.terms import PolicyTerms, policy_terms

__all__ = [
    "PolicyBatch",
    "PolicyLossOutput",
    "PolicyLossSpec",
    "PolicyTerms",
    "differentiable_loss",
    "importance_weights",
    "policy_loss",
    "policy_terms",
    "prepare",
    "summarize",
]


@dispatch.untraced(within=compiled.policy_loss)
def policy_loss(
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    entropy: torch.Tensor | None = None,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    sampling_logprobs: torch.Tensor | None = None,
    importance_weights: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    spec: PolicyLossSpec | None = None,
) -> PolicyLossOutput:
    """Policy loss of log-probs that somebody else computed; the spec's temperature is not used.

    Args:
        logprobs: (N,) float, differentiable.
        advantages: (B,) one a completion, or (N,) one a token.
        cu_seqlens: (B + 1,) int32.
        entropy: (N,) float, differentiable; needed for an entropy bonus, else for metrics only.
        old_logprobs: (N,) of the policy that is improved; None = on-policy, ratio 1 with gradient.
        ref_logprobs: (N,) of the reference policy; needed when `spec.beta` is not 0.
        sampling_logprobs: (N,) as the rollout engine reported them; for the spec's corrections and
            two metrics.
        importance_weights: (B,) or (N,) multiply the policy term (truncated importance sampling).
        mask: (N,) bool, True on trained tokens; None = all.
        spec: options; None = `PolicyLossSpec()`.

    Raises:
        ValueError: wrong shapes, dtypes or devices; a term of the spec whose input is missing.
    """
    spec = given_spec(spec)
    check_logprobs(logprobs, entropy, spec)
    dtype = checks.working_dtype(logprobs.dtype)
    batch = prepare(
        spec,
        logprobs.numel(),
        dtype,
        logprobs.device,
        advantages,
        cu_seqlens,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampling_logprobs=sampling_logprobs,
        importance_weights=importance_weights,
        mask=mask,
    )
    entropy = None if entropy is None else entropy.to(dtype)
    return differentiable_loss(batch, logprobs.to(dtype), entropy, spec)


def differentiable_loss(
    batch: PolicyBatch,
    logprobs: torch.Tensor,
    entropy: torch.Tensor | None,
    spec: PolicyLossSpec,
) -> PolicyLossOutput:
    """The loss of `batch`, with gradients to `logprobs` (N,) and, for a bonus, `entropy` (N,)."""
    values, entropies = logprobs.detach(), None if entropy is None else entropy.detach()
    terms = policy_terms(batch, values, entropies, spec)
    bonus = entropy if spec.entropy_coef else None
    loss = _WithSlopes.apply(
        steady_sum(terms.loss), logprobs, terms.coefficient, bonus, terms.entropy_coefficient
    )
    return PolicyLossOutput(loss, values, entropies, summarize(batch, terms, values, entropies))


class _WithSlopes(torch.autograd.Function):
    """A scalar whose derivatives by `logprobs` and `entropy` are known."""

    @staticmethod
    def forward(ctx: Any, loss, logprobs, slope, entropy, entropy_slope):
        ctx.save_for_backward(slope, entropy_slope)
        return loss.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: torch.Tensor):
        slope, entropy_slope = ctx.saved_tensors
        by_entropy = None if entropy_slope is None else upstream * entropy_slope
        return None, upstream * slope, None, by_entropy, None
