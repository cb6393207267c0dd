"""What is built around flash-attn: cuts, merge, backward. `flash_double.py` stands for it."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch
from attention_checks import LAYOUTS, compare, make, run
from flash_double import FlashDouble

from polymath_fast.kernels.prefix_attention.blocks import Block

IMPLEMENTATION = "polymath_fast.kernels.prefix_attention._flash"


@pytest.fixture
def double(monkeypatch):
    package, interface = ModuleType("flash_attn"), FlashDouble()
    package.flash_attn_interface = interface
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.delitem(sys.modules, IMPLEMENTATION, raising=False)
    yield interface
    sys.modules.pop(IMPLEMENTATION, None)


def implementation():
    return importlib.import_module(IMPLEMENTATION)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_float64(double, layout, dtype):
    for alone in (False, True):
        compare(implementation().prefix_attention, layout, dtype=dtype, alone=alone)


def test_calls_of_the_library(double):
    """One for all segments, one for each block with completions; always the deterministic way."""
    layout = [(3, [9, 0, 1]), (1, []), (20, [0, 31, 2])]
    run(implementation().prefix_attention, make(layout, (2, 1), 16, torch.float32), layout, 0.3)
    forward = [call for call in double.calls if call["kind"] == "forward"]
    backward = [call for call in double.calls if call["kind"] == "backward"]
    assert [call["causal"] for call in forward] == [True, False, False]
    assert [call["queries"].tolist() for call in forward[1:]] == [[0, 10], [0, 33]]
    assert len(backward) == 3 and all(call["deterministic"] for call in backward)


def test_queries_of_a_long_block_run_beside_each_other(double):
    layout = [(130, [300, 211])]
    run(implementation().prefix_attention, make(layout, (4, 1), 8, torch.float32), layout, 0.3)
    # 160 programs wanted, 4 heads: 40 runs of 13 rows
    assert double.calls[-1]["queries"].tolist() == [*range(0, 511, 13), 511]


def test_the_layout_is_made_once_for_all_layers(double):
    layout = [(5, [14, 6])]
    tensors = make(layout, (2, 1), 16, torch.float32)
    attend = implementation()
    for _ in range(3):
        run(attend.prefix_attention, tensors, layout, 0.3)
    assert attend._layout.cache_info().misses == 1


@pytest.mark.parametrize("head_dim", [12, 264])
def test_widths_that_the_library_does_not_take(double, head_dim):
    q, k, v, _ = make([(3, [2])], (1, 1), head_dim, torch.float32)
    with pytest.raises(ValueError, match=f"head_dim {head_dim}.*multiples of 8 up to 256"):
        implementation().prefix_attention(q, k, v, (Block(3, (0, 2)),), 0.3)
