"""Group advantages in plain PyTorch: the specification."""

from __future__ import annotations

import torch


def group_advantages(
    rewards: torch.Tensor, ids: torch.Tensor, scale: str, eps: float, baseline: str
) -> torch.Tensor:
    """`rewards` (B,), `ids` (B,) int64 in any order -> (B,)."""
    dtype = rewards.dtype if rewards.dtype == torch.float64 else torch.float32
    if rewards.numel() == 0:
        return rewards.to(dtype)
    _, groups, sizes = torch.unique(ids, return_inverse=True, return_counts=True)
    order = groups.argsort(stable=True)

    def per_group(values: torch.Tensor, reduce: str) -> torch.Tensor:
        return torch.segment_reduce(values[order], reduce, lengths=sizes)[groups]

    valid = ~rewards.isnan()
    values = torch.where(valid, rewards, 0).double()
    count = per_group(valid.double(), "sum")
    mean = per_group(values, "sum") / count.clamp(min=1)
    deviation = torch.where(valid, values - mean, 0)
    # The mean of equal numbers can be off by one rounding; their advantage is exactly zero, which
    # is what lets the learner skip such groups.
    highest = per_group(torch.where(valid, values, -torch.inf), "max")
    lowest = per_group(torch.where(valid, values, torch.inf), "min")
    deviation = torch.where(highest > lowest, deviation, 0)

    advantages = deviation
    if baseline == "leave_one_out":
        advantages = deviation * count / (count - 1).clamp(min=1)
    if scale == "group":
        spread = (per_group(deviation.square(), "sum") / (count - 1).clamp(min=1)).sqrt()
        advantages = advantages / (spread + eps)
    elif scale == "batch":
        total = valid.sum()
        centred = torch.where(valid, values - values.sum() / total.clamp(min=1), 0)
        spread = (centred.square().sum() / (total - 1).clamp(min=1)).sqrt()
        advantages = advantages / (spread + eps)
    # 0 / 0 when every reward is the same and eps is 0
    return torch.where(deviation == 0, 0, advantages).to(dtype)
