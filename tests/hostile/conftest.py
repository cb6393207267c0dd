"""Reward functions that a user wrote."""

from __future__ import annotations

import textwrap

import pytest

from polymath_fast import rewards


@pytest.fixture
def reward_of(tmp_path):
    """Builds a reward set from the source of a function called `reward`."""
    built = []

    def build(source: str, timeout: float = 1.0) -> rewards.RewardSet:
        path = tmp_path / f"mine_{len(built)}.py"
        path.write_text(textwrap.dedent(source))
        built.append(rewards.build([f"{path}:reward"], timeout=timeout))
        return built[-1]

    yield build
    for reward_set in built:
        reward_set.close()
