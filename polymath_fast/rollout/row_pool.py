"""Rows of memory that several completions may have in common, and that are free when nobody has
them."""

from __future__ import annotations

import numpy as np


class Rows:
    """Which of `count` rows are taken, and how often each."""

    def __init__(self, count: int):
        self._count = count
        self._holders = np.zeros(0, np.int32)  # of each row that was ever taken, and of some more
        self._fresh = 0  # rows from here on were never taken
        self._returned: list[int] = []

    @property
    def left(self) -> int:
        """How many are free."""
        return self._count - self._fresh + len(self._returned)

    @property
    def taken(self) -> int:
        """How many are not."""
        return self._count - self.left

    def take(self, holders: np.ndarray) -> np.ndarray:
        """A row (n,) for each of holders (n,), the numbers of those who will hold it, at least 1;
        there must be as many left."""
        again = [self._returned.pop() for _ in range(min(len(holders), len(self._returned)))]
        end = self._fresh + len(holders) - len(again)
        rows = np.concatenate([np.array(again, np.int64), np.arange(self._fresh, end)])
        self._fresh = end
        if end > len(self._holders):
            self._holders = np.pad(self._holders, (0, end))
        self._holders[rows] = holders
        return rows

    def give_back(self, rows: np.ndarray) -> None:
        """One holder of each of `rows` (n,) has no more use for it; a row may be there twice."""
        np.subtract.at(self._holders, rows, 1)
        distinct = np.unique(rows)
        self._returned += distinct[self._holders[distinct] == 0].tolist()[::-1]
