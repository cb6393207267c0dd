"""Rewards that need no answer: the format of a completion and its length."""

from __future__ import annotations

from collections.abc import Callable

from polymath_fast.errors import UserError
from polymath_fast.rewards.contract import RewardInput, Scores
from polymath_fast.rewards.extraction import box_spans, final_part

SOFT_LIMIT = 0.8


class FormatReward:
    r"""1.0 when the final answer is given in exactly one `\boxed{...}` that is closed and not
    blank, else 0.0. With a `</think>` only what follows it is looked at; a `<think>` that never
    ends has no final answer. Whether the answer is right plays no part."""

    name = "format"

    def score(self, batch: RewardInput) -> Scores:
        """One score, 0.0 or 1.0, per completion."""
        return Scores(values=[float(has_one_box(text)) for text in batch.completions])

    def prepare(self, batch: RewardInput, stop: Callable[[], bool]) -> None:
        """Nothing takes long."""

    def close(self) -> None:
        """Nothing to end."""


def has_one_box(completion: str) -> bool:
    r"""Whether the final part of `completion` holds exactly one closed, non-blank `\boxed{}`."""
    final = final_part(completion)
    spans = box_spans(final)
    return "<think>" not in final and len(spans) == 1 and not _blank(final[slice(*spans[0])])


def _blank(text: str) -> bool:
    return not text.strip()


class LengthReward:
    """A penalty in [-1, 0]: 0 up to 80 % of the maximum completion length, from there falling
    linearly to -1 at the maximum (soft overlong punishment of DAPO, arXiv 2503.14476, eq. 13)."""

    name = "length"

    def __init__(self, max_completion_length: int | None) -> None:
        """`max_completion_length`: tokens. Raises UserError when it is missing or below 1."""
        if max_completion_length is None or max_completion_length < 1:
            raise UserError(
                "the reward 'length' needs a maximum completion length of at least 1 token, not "
                f"{max_completion_length}; for example --max-completion-length 1024"
            )
        self.maximum = max_completion_length
        self.soft_limit = SOFT_LIMIT * max_completion_length

    def score(self, batch: RewardInput) -> Scores:
        """One penalty per completion, from its number of tokens."""
        return Scores(values=[self.penalty(len(ids)) for ids in batch.completion_ids])

    def penalty(self, length: int) -> float:
        """The penalty of a completion of `length` tokens."""
        excess = (length - self.soft_limit) / (self.maximum - self.soft_limit)
        return -min(1.0, max(0.0, excess))

    def prepare(self, batch: RewardInput, stop: Callable[[], bool]) -> None:
        """Nothing takes long."""

    def close(self) -> None:
        """Nothing to end."""
