"""What goes into a reward and what comes out of it.

A reward has TRL's signature: `reward(prompts, completions, completion_ids, **columns) -> list` with
one float per completion, or None where it does not apply.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

MAX_REWARD = 1e6  # its square still has room in float32 sums


@dataclass(frozen=True, kw_only=True)
class RewardInput:
    """Completions to score; every sequence, and every column, has one entry per completion."""

    prompts: Sequence[str]
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.completions)

    def take(self, index: int) -> RewardInput:
        """The completion at `index` on its own."""
        return RewardInput(
            prompts=[self.prompts[index]],
            completions=[self.completions[index]],
            completion_ids=[self.completion_ids[index]],
            columns={name: [values[index]] for name, values in self.columns.items()},
        )


@dataclass(kw_only=True)
class Scores:
    """One reward's verdict on a batch."""

    values: list[float | None]
    """reward per completion; None where the reward does not apply or could not be computed"""
    failures: dict[int, str] = field(default_factory=dict)
    """completions that could not be scored for no fault of theirs, and why"""
    timeouts: int = 0
    """completions whose answer was too expensive to verify; they score 0"""


class Reward(Protocol):
    """A scorer with a name."""

    name: str

    def score(self, batch: RewardInput) -> Scores:
        """Scores of a whole batch."""

    def prepare(self, batch: RewardInput, stop: Callable[[], bool]) -> None:
        """Work ahead for a `score` of a batch that will hold these completions among others.

        Runs in another thread while others are still sampled, until `stop()`. It may make `score`
        faster, never change what it returns.
        """

    def close(self) -> None:
        """End its processes; scoring after that starts new ones."""


def validated(returned: object, expected: int) -> list[float | None]:
    """`returned`, checked against the contract, as floats and Nones.

    Lists and tuples of Python or numpy scalars pass; True and False count as 1.0 and 0.0.
    Raises ValueError that says what was returned and what is expected.
    """
    rule = f"expected a list of {expected} numbers (None = not scored)"
    if not isinstance(returned, (list, tuple)):
        kind = type(returned).__name__
        hint = "; call .tolist() on it" if hasattr(returned, "tolist") else ""
        raise ValueError(f"returned a {kind}{hint}: {rule}")
    if len(returned) != expected:
        raise ValueError(f"returned {len(returned)} rewards for {expected} completions: {rule}")
    return [_scalar(value, index) for index, value in enumerate(returned)]


def _scalar(value: object, index: int) -> float | None:
    if value is None:
        return None
    is_bool = isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")
    if not is_bool and not isinstance(value, numbers.Real):
        hint = "; call .item() on it" if hasattr(value, "item") else ""
        raise ValueError(
            f"returned a {type(value).__name__} at position {index}{hint}: "
            "expected a float, an int or None"
        )
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:  # a whole number beyond the range of floats
        number = math.inf
    if not math.isfinite(number) or abs(number) > MAX_REWARD:
        raise ValueError(
            f"returned {number} at position {index}: rewards must be finite and at most "
            f"{MAX_REWARD:g} in size, e.g. 0.0 or 1.0"
        )
    return number
