"""Tiles without a matrix unit, and a look at what passes over a tape."""

from __future__ import annotations

import pytest

from polymath_fast.kernels.cpu import tiles
from polymath_fast.learner import taped


@pytest.fixture(autouse=True)
def tiles_of_either_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "available", lambda dtype: True)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each pass over a tape."""
    seen, init = [], taped.TapedPass.__init__
    monkeypatch.setattr(
        taped.TapedPass,
        "__init__",
        lambda self, policy, rows, *more: (seen.append(len(rows)), init(self, policy, rows, *more))[
            1
        ],
    )
    return seen
