"""From log-probs to loss and coefficients: the one place where the loss maths is put together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polymath_fast.kernels.policy_loss import corrections
from polymath_fast.kernels.policy_loss.batch import PolicyBatch
from polymath_fast.kernels.policy_loss.kl import kl_penalty
from polymath_fast.kernels.policy_loss.packed import sequence_ids, sequence_mean
from polymath_fast.kernels.policy_loss.spec import TOKEN_MEAN, PolicyLossSpec
from polymath_fast.kernels.policy_loss.table import TOKEN_LOSSES, TokenInputs, TokenLoss


@dataclass(frozen=True, kw_only=True)
class PolicyTerms:
    """Of each token, weighted, so that the loss of the call is the sum of `loss`."""

    loss: torch.Tensor  # (N,)
    coefficient: torch.Tensor  # (N,) d loss of the call / d logprob; 0 where it is not finite
    entropy_coefficient: torch.Tensor | None  # (N,) d loss of the call / d entropy
    ratio: torch.Tensor  # (N,) importance ratio
    kl: torch.Tensor | None  # (N,) KL estimate, not weighted
    importance: torch.Tensor | None  # (N,) weight of the policy term
    unsound: torch.Tensor  # (N,) bool, trained tokens without a finite log-prob or coefficient
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
        entropy: (N,) entropies; needed for an entropy bonus and for `top_entropy_quantile`.
    """
    old = logprobs if batch.old_logprobs is None else batch.old_logprobs
    log_ratio, moves = _log_ratio(batch, logprobs, old, spec)
    importance = _importance(batch, old, spec)
    gamma = _gamma(batch, logprobs, old, importance, spec)
    inputs = TokenInputs(logprobs, old, log_ratio, batch.advantages, batch.mask, moves, gamma)
    token = TOKEN_LOSSES[spec.formula](inputs, spec)
    high_entropy = None
    if spec.top_entropy_quantile < 1:
        share = spec.top_entropy_quantile
        high_entropy = corrections.high_entropy_mask(entropy, batch.mask, share)
    factor = _factor(batch, logprobs, old, importance, high_entropy, spec)
    loss = token.loss * factor
    zero = torch.zeros_like(loss)
    through_ratio = zero if token.ratio_slope is None else token.ratio_slope * factor
    direct = zero if token.logprob_slope is None else token.logprob_slope * factor
    kl = None
    if spec.beta:
        reference = torch.where(batch.mask, batch.ref_logprobs, logprobs)
        kl, slope = kl_penalty(logprobs, reference, spec)
        if spec.use_bias_correction_kl:
            kl, slope = kl * log_ratio.exp(), slope * log_ratio.exp()
            through_ratio = through_ratio + spec.beta * kl
        loss = loss + spec.beta * kl
        direct = direct + spec.beta * slope
    coefficient = _weigh(batch, direct, through_ratio, moves, spec)
    loss = torch.where(batch.mask, loss * batch.weights, 0)
    sound = logprobs.isfinite() & coefficient.isfinite()
    by_entropy = None
    if spec.entropy_coef:
        by_entropy = -spec.entropy_coef * _entropy_weights(batch, high_entropy, spec)
        loss = loss + torch.where(by_entropy != 0, by_entropy * entropy, 0)
        by_entropy = torch.where(sound, by_entropy, 0)
    return PolicyTerms(
        loss=loss,
        coefficient=torch.where(sound, coefficient, 0),
        entropy_coefficient=by_entropy,
        ratio=log_ratio.exp(),
        kl=kl,
        importance=importance,
        unsound=batch.mask & ~sound,
        token_loss=token,
    )


def _log_ratio(
    batch: PolicyBatch, logprobs: torch.Tensor, old: torch.Tensor, spec: PolicyLossSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) log importance ratio of the token or its completion, clamped; (N,) bool, whether the
    token's log-prob moves it."""
    log_ratio = torch.where(batch.mask, logprobs - old, 0)
    moves = batch.mask
    if spec.formula == "geo_mean":
        sign = batch.advantages.sign()
        clipped = log_ratio.clamp(-spec.epsilon, spec.upper_epsilon)
        moves = moves & (sign * log_ratio <= sign * clipped)
        log_ratio = torch.where(moves, log_ratio, clipped)
    if spec.level != "token":
        log_ratio = sequence_mean(log_ratio, batch.mask, batch.cu_seqlens)
    if spec.log_ratio_clamp is not None:
        moves = moves & (log_ratio.abs() <= spec.log_ratio_clamp)
        log_ratio = log_ratio.clamp(-spec.log_ratio_clamp, spec.log_ratio_clamp)
    return log_ratio, moves


def _importance(batch: PolicyBatch, old: torch.Tensor, spec: PolicyLossSpec) -> torch.Tensor | None:
    """(N,) weights that correct for the sampler, given or computed."""
    if spec.importance_sampling_mode is None:
        return batch.importance_weights
    weights = corrections.correction_weights(
        old,
        batch.sampling_logprobs,
        batch.cu_seqlens,
        mask=batch.mask,
        mode=spec.importance_sampling_mode,
        clip_max=spec.importance_sampling_clip_max,
        clip_min=spec.importance_sampling_clip_min,
    )
    if spec.importance_sampling_mode.startswith("sequence"):
        return weights[sequence_ids(batch.cu_seqlens, old.numel())]
    return weights


def _gamma(
    batch: PolicyBatch,
    logprobs: torch.Tensor,
    old: torch.Tensor,
    importance: torch.Tensor | None,
    spec: PolicyLossSpec,
) -> torch.Tensor | None:
    if spec.formula != "vespo":
        return None
    return corrections.gamma_weights(
        logprobs - old, importance, batch.advantages, batch.mask, batch.cu_seqlens, spec
    )


def _factor(
    batch: PolicyBatch,
    logprobs: torch.Tensor,
    old: torch.Tensor,
    importance: torch.Tensor | None,
    high_entropy: torch.Tensor | None,
    spec: PolicyLossSpec,
) -> torch.Tensor:
    """(N,) what multiplies the policy term: corrections and masks, not the KL penalty's weight."""
    factor = torch.ones_like(logprobs)
    if spec.formula == "geo_mean" and importance is not None:
        logs = (importance + 1e-10).log()
        factor = sequence_mean(logs, batch.mask, batch.cu_seqlens).exp()
    elif spec.formula != "vespo" and importance is not None:
        factor = importance
    if spec.off_policy_mask_threshold is not None:
        sampler = old if batch.sampling_logprobs is None else batch.sampling_logprobs
        kept = corrections.off_policy_mask(
            logprobs,
            sampler,
            batch.advantages,
            batch.mask,
            batch.cu_seqlens,
            spec.off_policy_mask_threshold,
        )
        factor = factor * kept
    return factor if high_entropy is None else factor * high_entropy


def _weigh(
    batch: PolicyBatch,
    direct: torch.Tensor,
    through_ratio: torch.Tensor,
    moves: torch.Tensor,
    spec: PolicyLossSpec,
) -> torch.Tensor:
    """(N,) d loss of the call / d logprob; a sequence ratio spreads evenly over its completion."""
    through_ratio = torch.where(batch.mask, batch.weights * through_ratio, 0)
    if spec.level == "sequence":
        through_ratio = sequence_mean(through_ratio, batch.mask, batch.cu_seqlens)
    through_ratio = torch.where(moves, through_ratio, 0)
    return torch.where(batch.mask, batch.weights * direct, 0) + through_ratio


def _entropy_weights(
    batch: PolicyBatch, high_entropy: torch.Tensor | None, spec: PolicyLossSpec
) -> torch.Tensor:
    """(N,) share of each token in the entropy bonus."""
    if high_entropy is None:
        return batch.entropy_weights
    weights = torch.where(high_entropy, batch.entropy_weights, 0)
    if spec.entropy_aggregation == TOKEN_MEAN:
        # the mean runs over the tokens that are left; divisors count all trained tokens
        weights = weights * (batch.mask.sum().to(weights) / high_entropy.sum().clamp(min=1))
    return weights
