"""The rewards of a run together: built by name, summed with weights, refused when they fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from polymath_fast.errors import UserError
from polymath_fast.rewards.builtin import FormatReward, LengthReward
from polymath_fast.rewards.contract import Reward, RewardInput, Scores
from polymath_fast.rewards.math_reward import MathReward
from polymath_fast.rewards.results import RewardCheck, RewardResult
from polymath_fast.rewards.user import MAX_FAILED_SHARE, UserReward

if TYPE_CHECKING:
    from polymath_fast.samples import Sample

BUILTIN = ("math", "format", "length")


class RewardSet:
    """Scores batches with one or several rewards. Close it, or use it in a `with` statement."""

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float] | None = None) -> None:
        """`weights`: one per reward, 1.0 each by default. Raises UserError for another number."""
        self.rewards = list(rewards)
        self.weights = [1.0] * len(self.rewards) if weights is None else list(weights)
        if len(self.weights) != len(self.rewards):
            raise UserError(
                f"--reward-weights has {len(self.weights)} values for {len(self.rewards)} rewards: "
                f"give one each, e.g. {' '.join(['1.0'] * len(self.rewards))}"
            )

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> RewardResult:
        """Scores completions; every argument, and every column, has one entry per completion.

        A None that a reward returns means that it does not apply there: the others are summed, as
        in TRL. A completion that a reward failed on (its process died) is excluded altogether:
        failures must not be trained on as if they were zeros.

        Raises:
            UserError: a reward broke its contract, failed on more than a fifth of the completions,
                or left every completion without a reward.
        """
        batch = RewardInput(
            prompts=prompts, completions=completions, completion_ids=completion_ids, columns=columns
        )
        if not completions:
            return RewardResult(
                total=[], per_reward={r.name: [] for r in self.rewards}, metrics={}, notes=[]
            )
        scores = [reward.score(batch) for reward in self.rewards]
        self._refuse_many_failures(scores, len(batch))
        total = [self._sum(scores, index) for index in range(len(batch))]
        if all(value is None for value in total):
            names = ", ".join(reward.name for reward in self.rewards)
            raise UserError(
                f"no completion of the batch got a reward: {names} gave None for all "
                f"{len(batch)}; return a number where the reward applies, e.g. 0.0 or 1.0"
            )
        return RewardResult(
            total=total,
            per_reward={r.name: s.values for r, s in zip(self.rewards, scores, strict=True)},
            metrics=self._metrics(scores, total),
            notes=self._notes(scores, len(batch)),
        )

    def prepare(self, batch: RewardInput, stop: Callable[[], bool]) -> None:
        """Let every reward work ahead for a batch that will hold the completions of `batch`; see
        `Reward.prepare`. Any thread may call it."""
        for reward in self.rewards:
            reward.prepare(batch, stop)

    def check(self, sample: Sample, encode: Callable[[str], Sequence[int]]) -> RewardCheck:
        r"""Scores `\boxed{answer}` and a wrong answer of `sample`, in the token ids that `encode`
        gives them; for --dry-run."""
        answer = "" if sample.answer is None else str(sample.answer)
        wrong = "1" if answer.strip() in ("0", "") else "0"
        texts = [rf"\boxed{{{answer}}}", rf"\boxed{{{wrong}}}"]
        columns = {**sample.columns, "answer": sample.answer}
        result = self.score(
            [sample.prompt] * 2,
            texts,
            [list(encode(text)) for text in texts],
            {name: [value] * 2 for name, value in columns.items()},
        )
        return RewardCheck(
            gold=result.total[0],
            wrong=result.total[1],
            gold_completion=texts[0],
            wrong_completion=texts[1],
        )

    def close(self) -> None:
        """Ends every process the rewards have started."""
        for reward in self.rewards:
            reward.close()

    def __enter__(self) -> RewardSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sum(self, scores: list[Scores], index: int) -> float | None:
        if any(index in score.failures for score in scores):
            return None
        earned = [
            weight * value
            for weight, score in zip(self.weights, scores, strict=True)
            if (value := score.values[index]) is not None
        ]
        return sum(earned) if earned else None

    def _refuse_many_failures(self, scores: list[Scores], size: int) -> None:
        for reward, score in zip(self.rewards, scores, strict=True):
            if len(score.failures) > MAX_FAILED_SHARE * size:
                raise UserError(
                    f"the reward '{reward.name}' failed on {len(score.failures)} of {size} "
                    f"completions, at most a fifth may be excluded; the first one: "
                    f"{next(iter(score.failures.values()))}"
                )

    def _metrics(self, scores: list[Scores], total: list[float | None]) -> dict[str, float]:
        metrics = {
            "reward/timeout_ratio": sum(score.timeouts for score in scores) / len(total),
            "reward/excluded_ratio": sum(value is None for value in total) / len(total),
        }
        if len(self.rewards) > 1:
            for reward, score in zip(self.rewards, scores, strict=True):
                values = [value for value in score.values if value is not None]
                if values:
                    metrics[f"reward/{reward.name}"] = sum(values) / len(values)
        return metrics

    def _notes(self, scores: list[Scores], size: int) -> list[str]:
        return [
            f"the reward '{reward.name}' failed on {len(score.failures)} of {size} completions "
            f"(excluded); the first one: {next(iter(score.failures.values()))}"
            for reward, score in zip(self.rewards, scores, strict=True)
            if score.failures
        ]


def build(
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    timeout: float = 5.0,
    *,
    max_completion_length: int | None = None,
) -> RewardSet:
    """The rewards of a run.

    Args:
        names: "math", "format", "length", or functions of the user's own as file.py:function or
            module:function.
        weights: one per name, 1.0 each by default.
        timeout: seconds per distinct answer (math) or per completion (a user's function).
        max_completion_length: tokens; needed by "length" only.
    Raises:
        UserError: an unknown name, one twice, a function that cannot be loaded, a wrong number of
            weights.
    """
    if not names:
        raise UserError("no reward is named: give at least one, e.g. --reward math")
    if timeout <= 0:
        raise UserError(f"--reward-timeout {timeout}: must be above 0 seconds, e.g. 5")
    for name in names:
        if not isinstance(name, str):
            kind = type(name).__name__
            raise UserError(f"a reward is given by name, e.g. my_reward.py:reward, not as a {kind}")
    if len(set(names)) < len(names):
        raise UserError(f"--reward {' '.join(names)}: the same reward is named twice")
    rewards: list[Reward] = []
    try:
        for name in names:
            rewards.append(_build_one(name, timeout, max_completion_length))
        labels = [reward.name for reward in rewards]
        if len(set(labels)) < len(labels):
            twin = next(label for label in labels if labels.count(label) > 1)
            raise UserError(f"two rewards are called {twin}: rename a file or a function")
        return RewardSet(rewards, weights)
    except BaseException:
        for reward in rewards:
            reward.close()
        raise


def _build_one(name: str, timeout: float, max_completion_length: int | None) -> Reward:
    if name == "math":
        return MathReward(timeout)
    if name == "format":
        return FormatReward()
    if name == "length":
        return LengthReward(max_completion_length)
    if ":" not in name:
        raise UserError(
            f"--reward {name}: there is no reward of that name; there are {', '.join(BUILTIN)}, "
            "and functions of your own as file.py:function"
        )
    return UserReward(name, timeout)
