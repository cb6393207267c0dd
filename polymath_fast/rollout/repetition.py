"""Completions that go round in circles."""

from __future__ import annotations

import torch
from torch import Tensor


class RepetitionWatch:
    """Finds rows whose last tokens are one pattern, of at most `period` tokens, `times` in a row.

    A tail of `times` patterns of p tokens is a run of p x (times - 1) tokens that each equal the
    token p places before, so a count a period is all that has to be kept. The rule is vLLM's.
    """

    def __init__(self, batch: int, times: int, period: int) -> None:
        self._runs = torch.zeros(batch, period, dtype=torch.int64)
        self._wanted = torch.arange(1, period + 1) * (times - 1)

    def looped(self, tokens: Tensor, rows: Tensor, step: int) -> Tensor:
        """(R,) bool of `rows` (R,), after tokens[rows, step] (B, L) was drawn for each of them.

        Every step of a row must be shown, in order.
        """
        periods = min(self._runs.shape[1], step)
        earlier = tokens[rows, step - periods : step].flip(1)  # column p - 1: p places before
        same = earlier == tokens[rows, step, None]
        runs = torch.where(same, self._runs[rows, :periods] + 1, 0)
        self._runs[rows, :periods] = runs
        return (runs >= self._wanted[:periods]).any(1)
