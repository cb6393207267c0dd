"""Which elements of a flat tensor are weights, and which of them decay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch


@dataclass(frozen=True)
class Segments:
    """Ranges of a flat tensor, sorted and disjoint; what lies between them is nobody's."""

    rows: tuple[tuple[int, int, bool], ...]
    """first element, the one after the last, whether weight decay applies"""
    device: torch.device

    @classmethod
    def of(
        cls, rows: Iterable[tuple[int, int, bool]], device: torch.device | str = "cpu"
    ) -> Segments:
        """Ranges in any order; neighbours of one kind become one.

        Raises:
            ValueError: a range is empty, begins below 0, or overlaps with another.
        """
        kept: list[tuple[int, int, bool]] = []
        end = 0
        for start, stop, decayed in sorted(rows):
            if start < end or stop <= start:
                raise ValueError(
                    f"segment {start}:{stop} after an end at {end}: segments must not overlap "
                    "and must hold at least one element"
                )
            if kept and kept[-1][1:] == (start, decayed):
                kept[-1] = (kept[-1][0], stop, decayed)
            else:
                kept.append((start, stop, decayed))
            end = stop
        return cls(tuple(kept), torch.device(device))

    @property
    def end(self) -> int:
        """The element after the last of all."""
        return self.rows[-1][1] if self.rows else 0

    def part(self, start: int, stop: int) -> Segments:
        """What lies in elements [start, stop), counted from `start`."""
        inside = [
            (max(first, start) - start, min(last, stop) - start, decayed)
            for first, last, decayed in self.rows
            if first < stop and last > start
        ]
        return Segments(tuple(inside), self.device)

    @staticmethod
    @lru_cache(maxsize=16)
    def whole(elements: int, device: torch.device) -> Segments:
        """All of a tensor, and all of it decays: the same each time, so that only the first one
        waits for its table."""
        return Segments.of([(0, elements, True)] if elements else [], device)

    @cached_property
    def table(self) -> torch.Tensor:
        """(3, segments) int64 on the device: starts, stops, 1 where weights decay."""
        columns = torch.tensor(self.rows, dtype=torch.int64).reshape(-1, 3)
        return columns.T.contiguous().to(self.device)
