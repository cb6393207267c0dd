"""Weights and masks that correct a batch for having been sampled by another policy."""

from __future__ import annotations

import math

import torch

from polymath_fast.kernels.checks import working_dtype
from polymath_fast.kernels.policy_loss.input_checks import check_cu_seqlens
from polymath_fast.kernels.policy_loss.packed import (
    either,
    sequence_ids,
    sequence_mean,
    sequence_sum,
)
from polymath_fast.kernels.policy_loss.spec import CORRECTIONS, PolicyLossSpec
from polymath_fast.kernels.policy_loss.spec_checks import check_bounds

_LOWEST = math.log(1e-8)
_HIGHEST = 20.0


def importance_weights(
    logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    mode: str = "sequence_mask",
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
) -> torch.Tensor:
    """Ratio of the training policy to the sampler, truncated (TIS) or masked (MIS).

    Args:
        logprobs: (N,) under the policy the ratio of the loss is taken against, before the update.
        sampling_logprobs: (N,) as the rollout engine reported them. NaN, where it could not say,
            counts as equal.
        cu_seqlens: (B + 1,) int32. Where they do not fit, weights of completions on a GPU are NaN,
            and a later call raises.
        mask: (N,) bool, True on trained tokens; None = all.
        mode: "token_*": one weight a token; "sequence_*": the product over the completion.
            "*_truncate": clamped to [clip_min, clip_max]; "*_mask": 0 outside of it (IcePop).

    Returns:
        (N,) for token modes, (B,) for sequence modes, fp32 (fp64 for fp64), detached; TRL's and
        verl's definitions.

    Raises:
        ValueError: unknown mode, shapes that differ, offsets that do not fit, bounds that are not
            above 0 or the wrong way round.

    Source: Your Efficient RL Framework Secretly Brings You Off-Policy RL Training (2025).
    """
    if mode not in CORRECTIONS:
        raise ValueError(f"mode={mode!r}: must be one of {', '.join(CORRECTIONS)}")
    if logprobs.shape != sampling_logprobs.shape or logprobs.ndim != 1:
        raise ValueError(
            f"logprobs {tuple(logprobs.shape)} and sampling_logprobs "
            f"{tuple(sampling_logprobs.shape)} must both be (N,)"
        )
    for name, value in (("logprobs", logprobs), ("sampling_logprobs", sampling_logprobs)):
        if not value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype}: must be float (N,), such as float32")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != logprobs.shape):
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}: must be bool like logprobs")
    check_bounds("clip_min", clip_min, "clip_max", clip_max)
    offsets, sound = check_cu_seqlens(cu_seqlens, len(logprobs), logprobs.device)
    dtype = working_dtype(logprobs.dtype)
    weights = correction_weights(
        logprobs.to(dtype),
        sampling_logprobs.to(dtype),
        offsets,
        mask=mask,
        mode=mode,
        clip_max=clip_max,
        clip_min=clip_min,
    )
    return weights * sound if sound is not None and mode.startswith("sequence") else weights


def correction_weights(
    logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    mode: str,
    clip_max: float | None,
    clip_min: float | None,
) -> torch.Tensor:
    """`importance_weights` of inputs that are known to fit."""
    difference = (logprobs - sampling_logprobs).detach().nan_to_num(nan=0.0)
    if mask is not None:
        difference = torch.where(mask, difference, 0)
    if mode.startswith("sequence"):
        difference = sequence_sum(difference, cu_seqlens)
    weights = difference.exp()
    if mode.endswith("truncate"):
        return weights.clamp(clip_min, clip_max) if (clip_min or clip_max) else weights
    low = -math.inf if clip_min is None else clip_min
    high = math.inf if clip_max is None else clip_max
    return torch.where((weights < low) | (weights > high), 0, weights)


def off_policy_mask(
    logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    threshold: float,
) -> torch.Tensor:
    """(N,) bool: False on completions of negative advantage that drifted further than `threshold`.

    Source: off-policy sequence masking, DeepSeek-V3.2 (arXiv 2512.02556).
    """
    drift = (sampling_logprobs - logprobs).nan_to_num(nan=0.0)
    return (advantages >= 0) | (sequence_mean(drift, mask, cu_seqlens) <= threshold)


def high_entropy_mask(entropy: torch.Tensor, mask: torch.Tensor, share: float) -> torch.Tensor:
    """(N,) bool: the trained tokens in the top `share` by entropy (arXiv 2506.01939)."""
    if not mask.numel():
        return mask
    # Untrained tokens go to the end of the order, so that the quantile never waits for a count.
    ordered = torch.where(mask, entropy, torch.inf).sort().values
    last = (mask.sum() - 1).clamp(min=0).to(entropy.dtype)
    position = last * (1 - share)
    # indexing by a 0-d tensor would wait for a GPU
    ends = torch.stack([position.floor(), position.ceil()]).long()
    below, above = ordered.gather(0, ends)
    threshold = below + (above - below).nan_to_num(nan=0.0) * (position - position.floor())
    return mask & (entropy >= threshold)


def gamma_weights(
    log_ratio: torch.Tensor,
    importance: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    spec: PolicyLossSpec,
) -> torch.Tensor:
    """(N,) VESPO's weight exp(lambda) w^k exp(-lambda w) of each token's completion.

    w is the product of its token ratios and, where given, importance weights.
    """
    total = log_ratio.clamp(-_HIGHEST, _HIGHEST)
    if importance is not None:
        total = total + importance.log().clamp(_LOWEST, _HIGHEST)
    total = sequence_sum(torch.where(mask, total, 0), cu_seqlens).clamp(_LOWEST, _HIGHEST)
    total = total[sequence_ids(cu_seqlens, log_ratio.numel())]
    good = advantages >= 0
    shape = either(good, spec.vespo_k_pos, spec.vespo_k_neg, total)
    rate = either(good, spec.vespo_lambda_pos, spec.vespo_lambda_neg, total)
    weight = (rate + shape * total - rate * total.exp()).exp()
    return weight.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
