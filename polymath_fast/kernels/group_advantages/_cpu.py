"""Group advantages on a CPU: groups side by side, then sums of neighbours, in numpy.

A thousand numbers are too few for threads, and for a kernel that would have to be compiled first.
"""

from __future__ import annotations

import numpy as np
import torch


def group_advantages(
    rewards: torch.Tensor, ids: torch.Tensor, scale: str, eps: float, baseline: str
) -> torch.Tensor:
    """`rewards` (B,), `ids` (B,) int64 in any order -> (B,)."""
    if not len(rewards):
        return rewards.float()
    names, values = ids.numpy(), rewards.double().numpy()
    order = None if (names[1:] >= names[:-1]).all() else names.argsort(kind="stable")
    if order is not None:
        names, values = names[order], values[order]
    starts = np.concatenate(([0], np.flatnonzero(names[1:] != names[:-1]) + 1))
    sizes = np.diff(starts, append=len(names))
    found = _in_order(values, starts, sizes, scale, eps, baseline)
    if order is not None:
        found[order] = found.copy()
    return torch.from_numpy(found).float()


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def _in_order(
    values: np.ndarray, starts: np.ndarray, sizes: np.ndarray, scale: str, eps: float, baseline: str
) -> np.ndarray:
    """(B,) of groups that lie one after the other; NaN has no reward."""
    valid = values == values
    known = np.where(valid, values, 0)
    count = np.add.reduceat(valid, starts, dtype=np.float64)
    others = np.maximum(count - 1, 1)
    mean = np.add.reduceat(known, starts) / np.maximum(count, 1)
    # that of equal numbers can be off by one rounding; their advantage is exactly zero
    highest = np.maximum.reduceat(np.where(valid, values, -np.inf), starts)
    lowest = np.minimum.reduceat(np.where(valid, values, np.inf), starts)
    deviation = np.where(valid, known - np.repeat(mean, sizes), 0)
    deviation[~np.repeat(highest > lowest, sizes)] = 0
    found = deviation
    if baseline == "leave_one_out":
        found = deviation * np.repeat(count / others, sizes)
    if scale == "group":
        squares = np.add.reduceat(deviation * deviation, starts)
        found = found / np.repeat(np.sqrt(squares / others) + eps, sizes)
    elif scale == "batch":
        found = found / (_spread(known, valid) + eps)
    return np.where(deviation == 0, 0, found)  # 0 / 0 where all rewards are the same and eps is 0


def _spread(known: np.ndarray, valid: np.ndarray) -> np.float64:
    """The standard deviation of all rewards that there are."""
    total = np.count_nonzero(valid)
    centred = np.where(valid, known - known.sum() / max(total, 1), 0)
    return np.sqrt((centred * centred).sum() / max(total - 1, 1))
