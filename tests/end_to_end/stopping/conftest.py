"""Flags of a small run whose reward stays awake."""

from __future__ import annotations

import pytest
from stopped_runs import make_flags


@pytest.fixture
def flags(tmp_path):
    return make_flags(tmp_path)
