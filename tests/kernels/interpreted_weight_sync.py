"""Copies of weights in Triton's interpreter.

`test_triton_interpreter.py` runs this file.
"""

from __future__ import annotations

import pytest
from interpreter import interpret
from weight_sync_cases import PAIRS, check, layouts

from polymath_fast.kernels.weight_sync import _triton as triton_sync

interpret()


@pytest.mark.parametrize(("src", "dst"), PAIRS, ids=str)
def test_weight_sync(src, dst, monkeypatch) -> None:
    """Chunks and blocks so small that a segment has several of them."""
    monkeypatch.setattr(triton_sync, "CHUNK", 4096)
    monkeypatch.setattr(triton_sync, "BLOCK", 512)
    check(triton_sync.weight_sync, layouts(src, dst))
