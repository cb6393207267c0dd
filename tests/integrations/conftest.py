"""Trainers that other packages bring along."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.fixture
def verl() -> ModuleType:
    """verl's core_algos; needs ray, tensordict and hydra, which CI does not install."""
    return pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)
