"""What to do with a step whose completions all earned the same: it has no policy gradient.

Once a sample is solved that is most steps, so they must be cheap, or made use of (--on-saturation).
"""

from __future__ import annotations

from collections.abc import Mapping

from polymath_fast.config import Config
from polymath_fast.rollout.types import RolloutBatch


def saturated(batch: RolloutBatch) -> bool:
    """Whether the rewards within every group are equal: no completion has an advantage."""
    return all(len({r for r in group.rewards if r is not None}) < 2 for group in batch.groups)


def asks_again(config: Config, batch: RolloutBatch, attempts: int) -> bool:
    """Whether a step whose groups were asked `attempts` times, with `batch` as the sum of it, asks
    them once more. The first time counts, so it is True for 0."""
    if attempts == 0:
        return True
    more = config.on_saturation == "resample" and attempts <= config.max_resamples
    return more and saturated(batch)


def note(config: Config, learned: Mapping[str, float]) -> str | None:
    """What to tell about a step of which the learner reports `learned`; None: nothing."""
    if learned.get("update/entropy_only"):
        return "all rewards are equal: the entropy bonus was trained alone (update/entropy_only)"
    if not learned["update/skipped"]:
        return None
    hints = {
        "skip": "; --on-saturation resample or entropy makes use of such steps",
        "resample": f"; {config.max_resamples} more draws were all equal too",
        "entropy": "",
    }
    return (
        "no completion has an advantage that may be trained: no update (update/skipped)"
        + hints[config.on_saturation]
    )
