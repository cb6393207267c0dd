"""Flags of a small run."""

from __future__ import annotations

import pytest
from train_runs import make_flags


@pytest.fixture
def flags(tmp_path):
    return make_flags(tmp_path)
