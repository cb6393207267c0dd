"""Estimates of the KL divergence from a reference policy, token by token."""

from __future__ import annotations

import torch

from polymath_fast.kernels.policy_loss.spec import PolicyLossSpec


def kl_penalty(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, spec: PolicyLossSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) estimate and (N,) its slope by the log-prob (Schulman, Approximating KL, 2020).

    k1 and k3 are good estimates of the value, k2 has the right gradient; "+" takes both.
    """
    difference = logprobs - ref_logprobs
    inside = torch.ones_like(difference, dtype=torch.bool)
    if spec.log_ratio_clamp is not None:
        inside = difference.abs() <= spec.log_ratio_clamp
        difference = difference.clamp(-spec.log_ratio_clamp, spec.log_ratio_clamp)
    estimator = spec.kl_estimator.removesuffix("+")
    if estimator == "k1":
        value, slope = difference, torch.ones_like(difference)
    elif estimator == "abs":
        value, slope = difference.abs(), difference.sign()
    elif estimator == "k2":
        value, slope = 0.5 * difference.square(), difference
    else:
        slope = -torch.expm1(-difference)
        value = difference - slope
    if spec.kl_max is not None:
        inside = inside & (value <= spec.kl_max)
        value = value.clamp(max=spec.kl_max)
    if spec.kl_estimator.endswith("+"):
        return value, logprobs - ref_logprobs
    return value, torch.where(inside, slope, 0)
