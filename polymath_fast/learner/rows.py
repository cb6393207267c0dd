"""What the learner makes of a scored batch of rollouts, before anything is computed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from polymath_fast.learner.packing import TrainingRow
from polymath_fast.rollout.types import RolloutBatch


def training_rows(
    batch: RolloutBatch,
    rewards: Sequence[float],
    advantages: Sequence[float],
    *,
    mask_truncated: bool,
) -> list[TrainingRow]:
    """The completions of a batch as rows to learn from; those whose reward is NaN are left out."""
    rows = []
    flat = zip(rewards, advantages, strict=True)
    for group in batch.groups:
        for completion in group.completions:
            reward, advantage = next(flat)
            if math.isnan(reward) or not completion.token_ids:
                continue
            rows.append(
                TrainingRow(
                    prompt_ids=group.sample.prompt_ids,
                    token_ids=completion.token_ids,
                    sampling_logprobs=completion.sampling_logprobs,
                    advantage=float(advantage),
                    trained=not (mask_truncated and completion.truncated),
                    rank=completion.rank,
                    recorded=completion.recorded,
                )
            )
    return rows


def with_influence(rows: Sequence[TrainingRow], regularised: bool) -> list[TrainingRow]:
    """The rows that the gradient depends on; the loss of the others has a coefficient of 0.

    `regularised`: by a term that asks for no advantage, of KL or entropy.
    """
    return [row for row in rows if row.trained and (row.advantage != 0 or regularised)]


def minibatches(rows: Sequence[TrainingRow], count: int, seed: str) -> list[list[TrainingRow]]:
    """Split rows into `count` parts at random; each part keeps the rows in their order."""
    if count == 1:
        return [list(rows)]
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    parts = [sorted(order[i::count]) for i in range(count)]
    return [[rows[i] for i in part] for part in parts if part]
