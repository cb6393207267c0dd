"""What to do with a step whose completions all earned the same: it has no policy gradient.

Once a sample is solved that is most steps, so they must be cheap, or made use of (--on-saturation).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from polymath_fast.config import Config
from polymath_fast.learner.downsampling import group_rewards
from polymath_fast.rollout.types import Group, RolloutBatch


def saturated(config: Config, batch: RolloutBatch) -> bool:
    """Whether no group has both different rewards of completions that advantages compare, and one
    that may be trained."""
    return not any(
        _differ(group_rewards(group, config)) and not _cut_off(config, group)
        for group in batch.groups
    )


def _differ(rewards: Iterable[float | None]) -> bool:
    """Whether there are several; None and NaN are none."""
    return len({value for value in rewards if value is not None and not math.isnan(value)}) > 1


def _cut_off(config: Config, group: Group) -> bool:
    """Whether --mask-truncated-completions leaves all of a group out."""
    return config.mask_truncated_completions and all(c.truncated for c in group.completions)


def asks_again(config: Config, batch: RolloutBatch, attempts: int) -> bool:
    """Whether a step whose groups were asked `attempts` times, with `batch` as the sum of it, asks
    them once more. The first time counts, so it is True for 0."""
    if attempts == 0:
        return True
    more = config.on_saturation == "resample" and attempts <= config.max_resamples
    return more and saturated(config, batch)


def note(config: Config, learned: Mapping[str, float], batch: RolloutBatch) -> str | None:
    """What to tell about a step with `batch` of which the learner reports `learned`; None:
    nothing."""
    if learned.get("update/entropy_only"):
        kept = " and the KL penalty were" if config.beta else " was"
        return f"all rewards are equal: the entropy bonus{kept} trained alone (update/entropy_only)"
    if not learned["update/skipped"]:
        return None
    if any(_differ(group.rewards) for group in batch.groups):
        return (
            "completions whose reward differs were all cut off, and --mask-truncated-completions "
            "leaves those out: no update (update/skipped); raise --max-completion-length"
        )
    hints = {
        "skip": "; --on-saturation resample or entropy makes use of such steps",
        "resample": f"; {config.max_resamples} more draws were all equal too",
        "entropy": "",
    }
    return (
        "no completion has an advantage that may be trained: no update (update/skipped)"
        + hints[config.on_saturation]
    )
