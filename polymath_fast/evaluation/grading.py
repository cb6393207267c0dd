"""Asking a model problems whose answers are known, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

from polymath_fast.evaluation.estimates import Estimate, estimate, pass_at_k
from polymath_fast.rollout.types import Completion, SamplingOptions

if TYPE_CHECKING:
    from polymath_fast.rewards import RewardResult
    from polymath_fast.samples import Sample

Score = Callable[
    [Sequence[str], Sequence[str], Sequence[Sequence[int]], Mapping[str, Sequence[Any]]],
    "RewardResult",
]
"""RewardSet.score, or anything that is called like it"""
RIGHT_FROM = 0.5


class Sampler(Protocol):
    """The part of a rollout engine that evaluation needs."""

    def generate_many(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingOptions
    ) -> list[list[Completion]]: ...


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Graded completions of a set of problems, k of each."""

    rows: list[dict[str, Any]]
    """one per completion: index (of the problem), attempt, problem, answer, prompt, completion,
    right (True, False, or None where grading failed), length (tokens), finish_reason"""
    timeouts: int = 0
    """completions whose answer was too expensive to verify; they count as wrong"""

    @cached_property
    def per_problem(self) -> list[list[bool]]:
        """Right or wrong, by problem; what could not be graded is wrong."""
        graded: dict[int, list[bool]] = {}
        for row in self.rows:
            graded.setdefault(row["index"], []).append(row["right"] is True)
        return list(graded.values())

    @property
    def k(self) -> int:
        """Completions per problem."""
        return min(map(len, self.per_problem))

    @property
    def correct(self) -> int:
        """Number of right completions."""
        return sum(map(sum, self.per_problem))

    @property
    def mean(self) -> Estimate:
        """mean@k: the share of right completions."""
        return estimate([fmean(graded) for graded in self.per_problem], self.k)

    def pass_at(self, k: int) -> Estimate:
        """pass@k for k up to `self.k`: the share of problems that k completions would solve."""
        shares = [pass_at_k(len(graded), sum(graded), k) for graded in self.per_problem]
        return estimate(shares, self.k)

    @property
    def truncated_ratio(self) -> float:
        """Share of completions cut at the maximum length."""
        return fmean(row["finish_reason"] == "length" for row in self.rows)

    @property
    def mean_length(self) -> float:
        """Mean number of tokens per completion."""
        return fmean(row["length"] for row in self.rows)

    @property
    def ungraded(self) -> int:
        """Completions whose grading failed for no fault of theirs; they count as wrong."""
        return sum(row["right"] is None for row in self.rows)

    def metrics(self) -> dict[str, float]:
        """Figures for metrics.jsonl: mean@k with low and high, the counts behind them, pass@k when
        k > 1, completion lengths."""
        mean = self.mean
        figures = {
            f"mean@{self.k}": mean.value,
            "low": mean.low,
            "high": mean.high,
            "correct": self.correct,
            "completions": len(self.rows),
            "truncated_ratio": self.truncated_ratio,
            "mean_length": self.mean_length,
        }
        if self.k > 1:
            figures[f"pass@{self.k}"] = self.pass_at(self.k).value
        return figures

    def summary(self) -> dict[str, Any]:
        """All figures for a result file; pass@k at every power of two up to k, and at k."""
        powers = [2**power for power in range(1, 32) if 2**power < self.k]
        ks = [*powers, self.k] if self.k > 1 else []
        return {
            "problems": len(self.per_problem),
            "k": self.k,
            "correct": self.correct,
            "completions": len(self.rows),
            f"mean@{self.k}": self.mean.as_dict(),
            **{f"pass@{k}": self.pass_at(k).as_dict() for k in ks},
            "truncated_ratio": self.truncated_ratio,
            "mean_length": self.mean_length,
            "timeouts": self.timeouts,
            "ungraded": self.ungraded,
        }


def evaluate_samples(
    engine: Sampler,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    k: int,
    temperature: float,
    max_completion_length: int,
    seed: int,
    score: Score,
) -> EvalResult:
    """Asks every sample k times and grades the completions.

    A completion is right when its `math` reward, or where there is none its total reward, is above
    0.5. The weights of a sum of rewards therefore do not touch accuracy.

    Args:
        temperature: 0 is greedy, for which k > 1 repeats the same completion.
        max_completion_length: tokens.
    """
    sampling = SamplingOptions(
        max_completion_length=max_completion_length, temperature=temperature, seed=seed
    )
    drawn = engine.generate_many([sample.prompt_ids for sample in samples], k, sampling)
    rows = [
        row
        for index, (sample, completions) in enumerate(zip(samples, drawn, strict=True))
        for row in _rows(index, sample, completions, tokenizer)
    ]
    ids = [completion.token_ids for completions in drawn for completion in completions]
    return grade(rows, ids, [sample for sample in samples for _ in range(k)], score)


def _rows(
    index: int, sample: Sample, completions: Iterable[Completion], tokenizer: Any
) -> Iterable[dict[str, Any]]:
    for attempt, completion in enumerate(completions):
        yield {
            "index": index,
            "attempt": attempt,
            "problem": sample.problem,
            "answer": sample.answer,
            "prompt": sample.prompt,
            "completion": tokenizer.decode(list(completion.token_ids), skip_special_tokens=True),
            "length": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }


def grade(
    rows: list[dict[str, Any]],
    completion_ids: Sequence[Sequence[int]],
    samples: Sequence[Sample],
    score: Score,
) -> EvalResult:
    """Gives every row its `right`; `completion_ids` and `samples` have one entry per row."""
    names = {name for sample in samples for name in sample.columns} - {"answer"}
    columns: dict[str, Sequence[Any]] = {
        name: [sample.columns.get(name) for sample in samples] for name in sorted(names)
    }
    columns["answer"] = [sample.answer for sample in samples]
    result = score(
        [row["prompt"] for row in rows],
        [row["completion"] for row in rows],
        completion_ids,
        columns,
    )
    values = result.per_reward.get("math", result.total)
    graded = [
        {**row, "right": None if value is None else value > RIGHT_FROM}
        for row, value in zip(rows, values, strict=True)
    ]
    timeouts = round(result.metrics.get("reward/timeout_ratio", 0.0) * len(rows))
    return EvalResult(rows=graded, timeouts=timeouts)
