"""What rewards say of a batch, and of a sample's own answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RewardResult:
    """What a batch earned."""

    total: list[float | None]
    """weighted sum per completion over the rewards that apply to it; None = excluded: a reward
    failed on it, or none applies"""
    per_reward: dict[str, list[float | None]]
    """unweighted, by reward: its name, without folders for a user's file"""
    metrics: dict[str, float]
    """reward/timeout_ratio: share of completions whose answer was too expensive to verify (score
    0); reward/excluded_ratio: share without a total; reward/NAME: mean of each of several"""
    notes: list[str]
    """one sentence per reward that failed on some completions"""

    def __add__(self, other: RewardResult) -> RewardResult:
        """Both batches as one; metrics are weighed by the number of completions."""
        if not self.total:
            return other
        sizes = len(self.total), len(other.total)
        metrics = {}
        for name in self.metrics | other.metrics:
            pairs = zip((self.metrics, other.metrics), sizes, strict=True)
            known = [(each[name], size) for each, size in pairs if name in each]
            metrics[name] = sum(v * size for v, size in known) / sum(size for _, size in known)
        return RewardResult(
            total=self.total + other.total,
            per_reward={n: self.per_reward[n] + other.per_reward[n] for n in self.per_reward},
            metrics=metrics,
            notes=self.notes + other.notes,
        )

    @classmethod
    def empty(cls) -> RewardResult:
        """Of no completions."""
        return cls(total=[], per_reward={}, metrics={}, notes=[])


@dataclass(frozen=True, kw_only=True)
class RewardCheck:
    """What the rewards say to the right answer and to a wrong one."""

    gold: float | None
    wrong: float | None
    gold_completion: str
    wrong_completion: str

    @property
    def separates(self) -> bool:
        """Whether the right answer earns more: without it there is nothing to learn."""
        return self.gold is not None and (self.wrong is None or self.gold > self.wrong)
