"""From log-probs to loss and coefficients: the one place where the loss maths is put together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polymath_fast.kernels.policy_loss.batch import PolicyBatch, sequence_ids, sequence_sum
from polymath_fast.kernels.policy_loss.spec import PolicyLossSpec
from polymath_fast.kernels.policy_loss.table import TOKEN_LOSSES, TokenLoss, kl_penalty


@dataclass(frozen=True, kw_only=True)
class PolicyTerms:
    """Of each token, weighted, so that the loss of the call is the sum of `loss`."""

    loss: torch.Tensor  # (N,)
    coefficient: torch.Tensor  # (N,) d loss of the call / d logprob
    entropy_coefficient: torch.Tensor | None  # (N,) d loss of the call / d entropy
    ratio: torch.Tensor  # (N,) importance ratio
    kl: torch.Tensor | None  # (N,) KL estimate, not weighted
    token_loss: TokenLoss


def policy_terms(
    batch: PolicyBatch,
    logprobs: torch.Tensor,
    entropy: torch.Tensor | None,
    spec: PolicyLossSpec,
) -> PolicyTerms:
    """Loss terms and coefficients of the tokens in `batch`.

    Args:
        logprobs: (N,) log-probs of the targets under the policy, detached.
        entropy: (N,) entropies; needed for an entropy bonus only.
    """
    log_ratio, ratio = _ratio(batch, logprobs, spec)
    token = TOKEN_LOSSES[spec.formula](ratio, batch.advantages, logprobs, spec)
    factor = 1.0 if batch.importance_weights is None else batch.importance_weights
    loss = token.loss * factor
    zero = torch.zeros_like(loss)
    through_ratio = zero if token.ratio_slope is None else token.ratio_slope * factor
    direct = zero if token.logprob_slope is None else token.logprob_slope * factor
    kl = None
    if spec.beta:
        reference = torch.where(batch.mask, batch.ref_logprobs, logprobs)
        kl, slope = kl_penalty(logprobs, reference, spec.kl_estimator)
        if spec.use_bias_correction_kl:
            slope = slope * ratio
            kl = kl * ratio
            through_ratio = through_ratio + spec.beta * kl
        loss = loss + spec.beta * kl
        direct = direct + spec.beta * slope
    if spec.log_ratio_clamp is not None:
        through_ratio = torch.where(log_ratio.abs() <= spec.log_ratio_clamp, through_ratio, 0)
    coefficient = _weigh(batch, direct, through_ratio, spec)
    loss = torch.where(batch.mask, loss * batch.weights, 0)
    entropy_coefficient = None
    if spec.entropy_coef:
        entropy_coefficient = -spec.entropy_coef * batch.entropy_weights
        loss = loss + torch.where(batch.mask, entropy_coefficient * entropy, 0)
    return PolicyTerms(
        loss=loss,
        coefficient=coefficient,
        entropy_coefficient=entropy_coefficient,
        ratio=ratio,
        kl=kl,
        token_loss=token,
    )


def _ratio(
    batch: PolicyBatch, logprobs: torch.Tensor, spec: PolicyLossSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) log importance ratio, of the token or of its completion, and the clamped ratio."""
    if batch.old_logprobs is None:
        log_ratio = torch.zeros_like(logprobs)
    else:
        log_ratio = torch.where(batch.mask, logprobs - batch.old_logprobs, 0)
        if spec.level != "token":
            log_ratio = _sequence_mean(batch, log_ratio)
    if spec.log_ratio_clamp is None:
        return log_ratio, log_ratio.exp()
    return log_ratio, log_ratio.clamp(-spec.log_ratio_clamp, spec.log_ratio_clamp).exp()


def _weigh(
    batch: PolicyBatch, direct: torch.Tensor, through_ratio: torch.Tensor, spec: PolicyLossSpec
) -> torch.Tensor:
    """(N,) d loss of the call / d logprob; a sequence ratio spreads evenly over its completion."""
    if spec.level != "sequence":
        return torch.where(batch.mask, batch.weights * (direct + through_ratio), 0)
    through_ratio = torch.where(batch.mask, batch.weights * through_ratio, 0)
    shared = _sequence_mean(batch, through_ratio)
    return torch.where(batch.mask, batch.weights * direct + shared, 0)


def _sequence_mean(batch: PolicyBatch, values: torch.Tensor) -> torch.Tensor:
    """(N,) mean of `values` over the trained tokens of each token's completion."""
    lengths = sequence_sum(batch.mask.to(values.dtype), batch.cu_seqlens).clamp(min=1)
    means = sequence_sum(torch.where(batch.mask, values, 0), batch.cu_seqlens) / lengths
    return means[sequence_ids(batch.cu_seqlens, values.numel())]


def summarize(
    batch: PolicyBatch,
    terms: PolicyTerms,
    logprobs: torch.Tensor,
    entropy: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Metrics as 0-d tensors on the device, over the trained tokens of the call.

    Means weigh every trained token alike, so calls combine exactly: weigh each by its "tokens".
    """
    mask = batch.mask
    tokens = mask.sum()
    divisor = tokens.clamp(min=1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, values.to(logprobs.dtype), 0).sum() / divisor

    ratio = torch.where(mask, terms.ratio, 1)
    metrics = {
        "tokens": tokens,
        "nonfinite_rows": (mask & ~logprobs.isfinite()).sum(),
        "ratio/mean": mean(ratio),
        "ratio/max": ratio.max() if ratio.numel() else ratio.new_ones(()),
    }
    if entropy is not None:
        metrics["entropy"] = mean(entropy)
    if terms.kl is not None:
        metrics["kl"] = mean(terms.kl)
    low, high = terms.token_loss.clipped_low, terms.token_loss.clipped_high
    if low is not None:
        metrics["clip_ratio/low"] = mean(low)
        metrics["clip_ratio/high"] = mean(high)
        metrics["clip_ratio/region"] = mean(low | high)
    return metrics
