"""The token losses: log-probs in, loss and slope out, each with its source.

A loss may depend on a token's log-prob through the importance ratio, directly, or both; the two
slopes are kept apart because a sequence-level ratio spreads its slope over the whole completion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from polymath_fast.kernels.policy_loss.spec import PolicyLossSpec


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
    """(N,) bool: the clip took the gradient away, below / above"""


def clip(
    ratio: torch.Tensor, advantages: torch.Tensor, logprobs: torch.Tensor, spec: PolicyLossSpec
) -> TokenLoss:
    """PPO (arXiv 1707.06347), clip-higher (DAPO, 2503.14476), two-sided (INTELLECT-2, 2505.07291).

    -min(min(ratio, delta) A, clamp(ratio, low, high) A)
    """
    bounded = ratio if spec.delta is None else ratio.clamp(max=spec.delta)
    clamped = ratio.clamp(spec.clip_low, spec.clip_high)
    # A = 0 decides by itself: inf * 0 of an overflowed ratio must not become NaN
    live = advantages != 0
    loss = -torch.min(bounded * advantages, clamped * advantages)
    low = (ratio < spec.clip_low) & (advantages < 0)
    high = (ratio > spec.clip_high) & (advantages > 0)
    free = live & ~low & ~high
    if spec.delta is not None:
        free = free & (ratio <= spec.delta)
    slope = torch.where(free, -ratio * advantages, 0)
    return TokenLoss(
        torch.where(live, loss, 0), ratio_slope=slope, clipped_low=low, clipped_high=high
    )


def cispo(
    ratio: torch.Tensor, advantages: torch.Tensor, logprobs: torch.Tensor, spec: PolicyLossSpec
) -> TokenLoss:
    """CISPO (MiniMax-M1, arXiv 2506.13585): -sg(min(ratio, epsilon_high)) A logprob."""
    coefficient = -ratio.clamp(max=spec.clip_high) * advantages
    high = (ratio > spec.clip_high) & (advantages > 0)
    return TokenLoss(
        coefficient * logprobs,
        logprob_slope=coefficient,
        clipped_low=torch.zeros_like(high),
        clipped_high=high,
    )


def sapo(
    ratio: torch.Tensor, advantages: torch.Tensor, logprobs: torch.Tensor, spec: PolicyLossSpec
) -> TokenLoss:
    """SAPO (arXiv 2511.20347): -(4 / t) sigmoid(t (ratio - 1)) A."""
    sharpness = torch.where(advantages > 0, spec.sapo_temperature_pos, spec.sapo_temperature_neg)
    gate = torch.sigmoid(sharpness * (ratio - 1))
    return TokenLoss(
        -gate * 4 / sharpness * advantages,
        ratio_slope=-4 * gate * (1 - gate) * ratio * advantages,
    )


def reinforce(
    ratio: torch.Tensor, advantages: torch.Tensor, logprobs: torch.Tensor, spec: PolicyLossSpec
) -> TokenLoss:
    """Policy gradient without a ratio (GPG, arXiv 2504.02546): -A logprob."""
    return TokenLoss(-advantages * logprobs, logprob_slope=-advantages)


TOKEN_LOSSES: dict[str, Callable[..., TokenLoss]] = {
    "clip": clip,
    "cispo": cispo,
    "sapo": sapo,
    "reinforce": reinforce,
}
"""formula of `PolicyLossSpec` -> token loss"""


def kl_penalty(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate of KL(policy, reference) of each token, and its slope (Schulman 2020)."""
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference, torch.ones_like(difference)
    if estimator == "k2":
        return 0.5 * difference.square(), difference
    shrink = torch.expm1(-difference)
    return shrink + difference, -shrink
