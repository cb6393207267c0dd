"""Completions of one prompt that have drawn the same tokens so far are one row of the decoder.

All of them begin as one; they part where they draw different tokens, and only then a row is
copied. A policy that grows sure of itself parts late, and completions that are equal to the end
are computed once. Each still draws with its own uniform numbers from its own distribution.

Legend: C completions that go on, B rows of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Branches:
    """Which row of a decoder each completion of a wave is on."""

    def __init__(self, prefixes: Sequence[tuple[int, ...]], *, apart: bool = False):
        """prefixes[i] is what completion i continues; `apart`: each has a row of its own."""
        self.starts = [*prefixes] if apart else [*dict.fromkeys(prefixes)]
        """what each row continues, B in the beginning"""
        self.count = len(self.starts)
        first = {prefix: row for row, prefix in enumerate(self.starts)}
        self.completions = torch.arange(len(prefixes))
        """(C,) ascending"""
        self.rows = torch.tensor([*range(self.count)] if apart else [*map(first.get, prefixes)])
        """(C,) rows are in the order of their first completions"""
        self._apart = apart

    def drop(self, ended: Tensor) -> None:
        """Completions ended (C,) go no further."""
        self.completions, self.rows = self.completions[~ended], self.rows[~ended]

    def grow(self, tokens: Tensor, drop_below: float) -> tuple[Tensor | None, Tensor]:
        """What follows from the tokens (C,) that were drawn: for each row of the decoder the one
        that it continues, None if all stay as they are, and the token that it reads next.

        Rows that no completion is on any more stay while there are no less than `drop_below` of
        the rows beside them.
        """
        if self._apart and len(self.rows) >= drop_below * self.count:
            fed = torch.zeros(self.count, dtype=torch.int64)
            fed[self.rows] = tokens
            return None, fed
        return self._regrouped(self.rows if self._apart else (self.rows << 32) + tokens, tokens)

    def split(self) -> Tensor:
        """A row for each completion; those that they continue."""
        parents, self._apart = self.rows, True
        self.rows = torch.arange(len(parents))
        self.count = len(parents)
        return parents

    def _regrouped(self, keys: Tensor, tokens: Tensor) -> tuple[Tensor | None, Tensor]:
        """Completions with equal keys (C,) go on together."""
        _, first, group = np.unique(keys.numpy(), return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        leaders = torch.from_numpy(first[order])
        parents, before = self.rows[leaders], self.count
        self.rows, self.count = torch.from_numpy(rank[group]), len(order)
        same = len(parents) == before and torch.equal(parents, torch.arange(before))
        return None if same else parents, tokens[leaders]
