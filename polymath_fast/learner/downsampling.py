"""Training on the most informative of many rollouts (PODS)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from polymath_fast.config import Config
from polymath_fast.rollout.types import Group, RolloutBatch


def max_variance_subset(rewards: Sequence[float], size: int) -> list[int]:
    """Indices, ascending, of the `size` rewards whose variance is the largest; O(n log n).

    Some number of the highest and the lowest rewards is always best, so only those splits are
    compared; of equal splits the most even one is taken.

    Args:
        rewards: (n,) finite.
        size: from 0 to n.

    Source: Not All Rollouts are Useful (arXiv 2504.13818), theorem 1.
    """
    if not 0 <= size <= len(rewards):
        raise ValueError(f"size={size}: must be from 0 to the {len(rewards)} rewards")
    order = sorted(range(len(rewards)), key=lambda i: rewards[i])
    middle = sum(rewards) / max(1, len(rewards))
    centred = [rewards[i] - middle for i in order]
    sums = [0.0, *accumulate(centred)]
    squares = [0.0, *accumulate(x * x for x in centred)]

    def spread(low: int) -> float:
        """`size` times the variance of the `low` lowest and the other highest."""
        high = len(order) - (size - low)
        total = sums[low] + sums[-1] - sums[high]
        return squares[low] + squares[-1] - squares[high] - total * total / max(1, size)

    low = max(range(size + 1), key=lambda low: (round(spread(low), 12), -abs(2 * low - size)))
    return sorted(order[:low] + order[len(order) - (size - low) :])


def train_rewards(batch: RolloutBatch, config: Config) -> list[float]:
    """(B,) rewards of a batch, NaN for completions that are not trained on.

    Left out are those without a reward and, with `num_train_generations`, those of each group that
    the maximum-variance rule does not choose. It chooses among completions that may carry loss.
    """
    return [reward for group in batch.groups for reward in group_rewards(group, config)]


def group_rewards(group: Group, config: Config) -> list[float]:
    """The same of one group."""
    values = [math.nan if reward is None else reward for reward in group.rewards]
    if config.num_train_generations is None:
        return values
    return _chosen(group.completions, values, config)


def _chosen(completions: Sequence, values: list[float], config: Config) -> list[float]:
    masked = config.mask_truncated_completions
    able = [
        i
        for i, (completion, value) in enumerate(zip(completions, values, strict=True))
        if not math.isnan(value) and not (masked and completion.truncated)
    ]
    size = min(config.num_train_generations, len(able))
    kept = {able[i] for i in max_variance_subset([values[i] for i in able], size)}
    return [value if i in kept else math.nan for i, value in enumerate(values)]
