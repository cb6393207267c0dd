"""Off-loading on a CPU."""

from __future__ import annotations

import pytest

from polymath_fast.learner import state_file


@pytest.fixture(autouse=True)
def offloads_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks that end neither with parts nor with pages."""
    monkeypatch.setattr(state_file.StateFile.__init__, "__defaults__", (10_007,))
