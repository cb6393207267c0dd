"""The token losses: log-probs in, loss and slope out, each with its source.

A loss may depend on a token's log-prob through the importance ratio, directly, or both; the two
slopes are kept apart because a sequence-level ratio spreads its slope over the whole completion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from polymath_fast.kernels.policy_loss import covariance
from polymath_fast.kernels.policy_loss.packed import either
from polymath_fast.kernels.policy_loss.spec import PolicyLossSpec


@dataclass(frozen=True)
class TokenInputs:
    """(N,) each."""

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    log_ratio: torch.Tensor
    """of the token or of its completion, clamped"""
    advantages: torch.Tensor
    mask: torch.Tensor
    """bool: trained tokens"""
    moves: torch.Tensor
    """bool: whether the token's log-prob moves the ratio, of trained tokens"""
    gamma: torch.Tensor | None
    """weight of the completion, vespo only"""

    @property
    def ratio(self) -> torch.Tensor:
        return self.log_ratio.exp()


@dataclass(frozen=True)
class TokenLoss:
    """Of each token, before weighting: (N,) each; None = zero everywhere."""

    loss: torch.Tensor
    ratio_slope: torch.Tensor | None = None
    """d loss / d log ratio"""
    logprob_slope: torch.Tensor | None = None
    """d loss / d logprob, the ratio held fixed"""
    clipped_low: torch.Tensor | None = None
    clipped_high: torch.Tensor | None = None
    """(N,) bool: a bound took the gradient, or part of it, below / above"""
    chosen: torch.Tensor | None = None
    """(N,) bool: tokens that the loss treats differently because of their covariance"""


def clip(x: TokenInputs, spec: PolicyLossSpec) -> TokenLoss:
    """PPO (arXiv 1707.06347) with clip-higher (DAPO, 2503.14476), an upper bound of the ratio
    (INTELLECT-2, 2505.07291) and dual clip (1912.09729).

    -min(min(ratio, delta) A, clamp(ratio, low, high) A), at most -clip_ratio_c A where A < 0
    """
    ratio, advantages = x.ratio, x.advantages
    bounded = ratio if spec.delta is None else ratio.clamp(max=spec.delta)
    clamped = ratio.clamp(spec.clip_low, spec.clip_high)
    loss = -torch.min(bounded * advantages, clamped * advantages)
    low = (ratio < spec.clip_low) & (advantages < 0)
    high = (ratio > spec.clip_high) & (advantages > 0)
    # A = 0 decides by itself: an overflowed ratio times it must not become NaN
    free = ~low & ~high & (advantages != 0)
    if spec.delta is not None:
        # where A < 0 the larger of the two bounds is the one that counts
        above = max(spec.delta, spec.clip_high)
        free = free & (ratio <= either(advantages < 0, above, spec.delta, ratio))
    if spec.clip_ratio_c is not None:
        ceiling = torch.where(advantages < 0, -spec.clip_ratio_c * advantages, torch.inf)
        free = free & (loss <= ceiling)
        loss = torch.minimum(loss, ceiling)
    return TokenLoss(
        torch.where(advantages != 0, loss, 0),
        ratio_slope=torch.where(free, -ratio * advantages, 0),
        clipped_low=low,
        clipped_high=high,
    )


def cispo(x: TokenInputs, spec: PolicyLossSpec) -> TokenLoss:
    """CISPO (MiniMax-M1, arXiv 2506.13585) as TRL has it: -sg(min(ratio, epsilon_high)) A logp."""
    return _weighted(x, x.ratio.clamp(max=spec.clip_high))


def cispo_two_sided(x: TokenInputs, spec: PolicyLossSpec) -> TokenLoss:
    """CISPO as verl has it: -sg(clamp(ratio, 1 - epsilon, 1 + epsilon_high)) A logprob."""
    return _weighted(x, x.ratio.clamp(spec.clip_low, spec.clip_high))


def sapo(x: TokenInputs, spec: PolicyLossSpec) -> TokenLoss:
    """SAPO (arXiv 2511.20347): -(4 / t) sigmoid(t (ratio - 1)) A."""
    positive = x.advantages > 0
    sharpness = either(positive, spec.sapo_temperature_pos, spec.sapo_temperature_neg, x.ratio)
    gate = torch.sigmoid(sharpness * (x.ratio - 1))
    return TokenLoss(
        -gate * 4 / sharpness * x.advantages,
        ratio_slope=-4 * gate * (1 - gate) * x.ratio * x.advantages,
    )


def vespo(x: TokenInputs, spec: PolicyLossSpec) -> TokenLoss:
    """VESPO (arXiv 2602.10693): -sg(gamma(w)) A logprob, w the ratio of the whole completion."""
    weight = -x.gamma * x.advantages
    return TokenLoss(weight * x.logprobs, logprob_slope=weight)


def geo_mean(x: TokenInputs, spec: PolicyLossSpec) -> TokenLoss:
    """GMPO (arXiv 2507.20673): -A times the geometric mean of the clipped token ratios."""
    loss = -x.advantages * x.ratio
    return TokenLoss(
        loss,
        ratio_slope=loss,
        clipped_low=~x.moves & (x.advantages < 0),
        clipped_high=~x.moves & (x.advantages > 0),
    )


def reinforce(x: TokenInputs, spec: PolicyLossSpec) -> TokenLoss:
    """Policy gradient without a ratio (GPG, arXiv 2504.02546): -A logprob."""
    return TokenLoss(-x.advantages * x.logprobs, logprob_slope=-x.advantages)


def dro(x: TokenInputs, spec: PolicyLossSpec) -> TokenLoss:
    """Direct reward optimisation (arXiv 2405.19107): -(A logprob - beta / 2 log(ratio)^2)."""
    penalty = 0.5 * spec.dro_beta * x.log_ratio.square()
    return TokenLoss(
        penalty - x.advantages * x.logprobs,
        ratio_slope=spec.dro_beta * x.log_ratio,
        logprob_slope=-x.advantages,
    )


def dppo_tv(x: TokenInputs, spec: PolicyLossSpec) -> TokenLoss:
    """DPPO (arXiv 2602.04879): a token whose probability moved too far has no gradient."""
    moved = x.logprobs.exp() - x.old_logprobs.exp()
    return _within(x, spec, moved > spec.upper_epsilon, moved < -spec.epsilon)


def dppo_kl(x: TokenInputs, spec: PolicyLossSpec) -> TokenLoss:
    """DPPO with the KL divergence of the two-outcome distribution {this token, any other}."""
    p, old_p = x.logprobs.exp(), x.old_logprobs.exp()
    others = (1 - old_p) * ((1 - old_p + 1e-8) / (1 - p + 1e-8)).log()
    divergence = old_p * (x.old_logprobs - x.logprobs) + others
    rose, fell = p > old_p, p < old_p
    return _within(
        x, spec, rose & (divergence > spec.upper_epsilon), fell & (divergence > spec.epsilon)
    )


def clip_cov(x: TokenInputs, spec: PolicyLossSpec) -> TokenLoss:
    """Clip-Cov (arXiv 2505.22617): `clip`, but for tokens with neither loss nor gradient, drawn
    from those of high covariance that no bound has clipped."""
    clipped = clip(x, spec)
    found = covariance.covariances(x.logprobs, x.advantages, x.mask)
    bounds = (spec.clip_cov_lb, spec.clip_cov_ub)
    free = ~clipped.clipped_low & ~clipped.clipped_high
    chosen = covariance.drawn_between(found, free, *bounds, spec.clip_cov_ratio)
    # a product, so that what is not finite still shows
    loss, slope = clipped.loss * ~chosen, clipped.ratio_slope * ~chosen
    return replace(clipped, loss=loss, ratio_slope=slope, chosen=chosen)


def kl_cov(x: TokenInputs, spec: PolicyLossSpec) -> TokenLoss:
    """KL-Cov (arXiv 2505.22617): -ratio A, + ppo_kl_coef |log ratio| at the tokens of the highest
    covariance. No bound clips the ratio."""
    found = covariance.covariances(x.logprobs, x.advantages, x.mask)
    chosen = covariance.largest(found, spec.kl_cov_ratio)
    gain = torch.where(x.advantages != 0, -x.ratio * x.advantages, 0)
    weight = either(chosen, spec.ppo_kl_coef, 0.0, gain)
    return TokenLoss(
        gain + weight * x.log_ratio.abs(),
        ratio_slope=gain + weight * x.log_ratio.sign(),
        chosen=chosen,
    )


TOKEN_LOSSES: dict[str, Callable[[TokenInputs, PolicyLossSpec], TokenLoss]] = {
    "clip": clip,
    "cispo": cispo,
    "cispo_two_sided": cispo_two_sided,
    "sapo": sapo,
    "vespo": vespo,
    "geo_mean": geo_mean,
    "reinforce": reinforce,
    "dro": dro,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
}
"""formula of `PolicyLossSpec` -> token loss"""
CLIPPING = ("clip", "cispo", "cispo_two_sided", "geo_mean", "dppo_tv", "dppo_kl", "clip_cov")
"""formulas that say which tokens a bound took the gradient from"""


def _weighted(x: TokenInputs, clamped: torch.Tensor) -> TokenLoss:
    """-clamped ratio * A * logprob, the ratio held fixed."""
    weight = -clamped * x.advantages
    positive = x.advantages > 0
    return TokenLoss(
        weight * x.logprobs,
        logprob_slope=weight,
        clipped_low=(x.ratio < clamped) & ~positive,
        clipped_high=(x.ratio > clamped) & positive,
    )


def _within(
    x: TokenInputs, spec: PolicyLossSpec, rose: torch.Tensor, fell: torch.Tensor
) -> TokenLoss:
    """-ratio * A * logprob; none where a good token `rose`, or another `fell`, too far."""
    positive = x.advantages > 0
    high, low = rose & positive, fell & ~positive
    largest = 20.0 if spec.clip_ratio_c is None else spec.clip_ratio_c
    weight = torch.where(low | high, 0, -x.ratio.clamp(max=largest) * x.advantages)
    return TokenLoss(weight * x.logprobs, logprob_slope=weight, clipped_low=low, clipped_high=high)
