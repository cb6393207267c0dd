"""Off-loading on a CPU."""

from __future__ import annotations

import pytest

from polymath_fast.learner import offload, optimizer_state


@pytest.fixture(autouse=True)
def offloads_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, too, where it saves nothing; in chunks that do not end with parts."""
    monkeypatch.setattr(optimizer_state, "require_gpu", lambda _: None)
    monkeypatch.setattr(offload.Offloaded.__init__, "__defaults__", (10_007,))
