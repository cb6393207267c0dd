"""Advantages of completions relative to the other completions of their prompt."""

from __future__ import annotations

import torch

from polymath_fast.kernels import checks, dispatch

__all__ = ["group_advantages"]

SCALES = ("group", "batch", "none")
BASELINES = ("mean", "leave_one_out")


@dispatch.untraced
def group_advantages(
    rewards: torch.Tensor,
    groups: torch.Tensor | int,
    *,
    scale: str = "group",
    eps: float = 1e-4,
    baseline: str = "mean",
    impl: str = "auto",
) -> torch.Tensor:
    """(reward - baseline of its group) / (standard deviation + eps).

    Args:
        rewards: (B,) rewards of one step, any float dtype. NaN marks a completion that has no
            reward: it gets advantage 0 and takes no part in the statistics.
        groups: (B,) integer group of each completion, in any order; or the size of every group,
            when groups are consecutive.
        scale: which standard deviation (n - 1 in the denominator) divides: that of the completion's
            "group" (GRPO), of the whole "batch", or "none" (Dr. GRPO).
        eps: added to the standard deviation. TRL adds 1e-4, verl 1e-6.
        baseline: "mean" of the group (GRPO), or "leave_one_out", the mean of the others (RLOO).
        impl: "auto", "reference", "cpu" or "triton".

    Returns:
        (B,) fp32 (fp64 for fp64 rewards). A group of one completion has advantage 0.

    Raises:
        ValueError: wrong shapes, a group size that does not divide B, an unknown option.
    """
    checks.check_tensor("rewards", rewards)
    if rewards.ndim != 1 or not rewards.is_floating_point():
        raise ValueError(
            f"rewards must be float (B,), got {tuple(rewards.shape)} {rewards.dtype}; "
            "one number a completion"
        )
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: must be one of {', '.join(SCALES)}")
    if baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r}: must be one of {', '.join(BASELINES)}")
    if not eps >= 0:
        raise ValueError(f"eps={eps}: must be >= 0, for example 1e-4")
    ids = _group_ids(rewards, groups)
    implementation = dispatch.resolve("group_advantages", rewards, impl)
    return implementation.group_advantages(rewards.detach(), ids, scale, eps, baseline)


def _group_ids(rewards: torch.Tensor, groups: torch.Tensor | int) -> torch.Tensor:
    """(B,) int64 group of each completion."""
    count = rewards.shape[0]
    if isinstance(groups, int):
        if groups < 1 or count % groups:
            raise ValueError(
                f"groups={groups}: a group size must be >= 1 and divide the {count} rewards; "
                "pass a (B,) tensor of group ids for ragged groups"
            )
        return torch.arange(count, device=rewards.device) // groups
    checks.check_tensor("groups", groups)
    if groups.shape != rewards.shape or groups.is_floating_point():
        raise ValueError(
            f"groups must be integers of shape {tuple(rewards.shape)}, "
            f"got {tuple(groups.shape)} {groups.dtype}"
        )
    if groups.device != rewards.device:
        raise ValueError(f"groups are on {groups.device}, rewards on {rewards.device}")
    return groups.long()
