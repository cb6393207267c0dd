"""The tables that attention kernels follow: every pair that must meet meets exactly once."""

from __future__ import annotations

import itertools

import attention_checks
import numpy as np
import pytest
from attention_checks import TREES, of_completions

from polymath_fast.kernels.prefix_attention.blocks import Block
from polymath_fast.kernels.triton import attention_schedule
from polymath_fast.kernels.triton.attention_schedule import Sizes, schedule

SMALL = (Sizes(4, 8), Sizes(8, 4), Sizes(4, 8))
LAYOUTS = {
    "no completion": [(9, [])],
    "only empty completions": [(4, [0, 0])],
    "prompt of one token": [(1, [3])],
    "ragged": [(7, [5, 1, 0, 17, 0, 2])],
    "one token each": [(5, [1] * 30)],
    "several blocks": [(3, [9, 1]), (1, []), (20, [0, 31, 2]), (2, [1])],
    **TREES,
}


def blocks_of(layout):
    return tuple(
        Block(prompt, tuple(itertools.accumulate(lengths, initial=0)), *map(tuple, more))
        for prompt, lengths, *more in layout
    )


def visible(layout, prompts_ask=True):
    """(T, T) bool, whether query i may see key j."""
    asks = np.ones(sum(prompt + sum(lengths) for prompt, lengths, *_ in layout), dtype=bool)
    if not prompts_ask:
        asks = of_completions(layout).numpy()
    return attention_checks.visible(layout).numpy() & asks[:, None]


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(attention_schedule, "SHORTEST", 4)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_last_is_where_a_key_is_no_longer_seen(layout):
    truth = visible(layout)
    last = schedule(blocks_of(layout), *SMALL, kv_heads=1).last
    row = np.arange(len(last))
    assert np.array_equal((row[None] <= row[:, None]) & (row[:, None] < last[None]), truth)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("prompts_ask", [True, False])
@pytest.mark.parametrize("table", ["queries", "gradients"])
def test_tiles_of_queries_meet_their_keys_once(layout, table, prompts_ask):
    truth = visible(layout, prompts_ask)
    made = schedule(blocks_of(layout), *SMALL, kv_heads=1, prompts_ask=prompts_ask)
    stored = np.cumsum(truth.any(1)) - 1
    sizes = SMALL[table == "gradients"]
    runs = made.gradient_runs if table == "gradients" else made.runs
    met = np.zeros(truth.shape, dtype=int)
    for first, end, low, high, own, whole, shift, run, last in getattr(made, table):
        assert first - shift == stored[first]
        assert 0 < end - first <= sizes.queries
        met[first:end, low:high] += 1
        for above, below in runs[run:last]:
            assert 0 < below - above <= sizes.keys
            met[first:end, above:below] += 1
            assert truth[first, above:below].all()
        met[first:end, own:end] += 1
        assert truth[first:end, low:high].all()
        assert truth[first:end, own : own + whole * sizes.keys].all()
        assert own + whole * sizes.keys <= end
    assert met.max() <= 1
    assert (met[truth] == 1).all()


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("prompts_ask", [True, False])
def test_units_give_every_key_all_its_queries_once(layout, prompts_ask):
    truth = visible(layout, prompts_ask)
    stored = np.cumsum(truth.any(1)) - 1
    sizes = SMALL[2]
    made = schedule(blocks_of(layout), *SMALL, kv_heads=1, prompts_ask=prompts_ask)
    written = {row for first, end, *_ in made.units for row in range(first, end)}
    assert written == set(range(len(truth)))
    met = np.zeros(truth.shape, dtype=int)
    for first, end, low, high, behind, whole, _, shift in made.units:
        assert low == high or low - shift == stored[low]
        middle = low + behind * sizes.queries
        assert behind == 0 or middle - sizes.queries < high
        assert whole == 0 or middle + whole * sizes.queries <= high
        assert truth[middle : middle + whole * sizes.queries, first:end].all()
        met[low:high, first:end] += 1
    assert met.max() <= 1
    assert (met[truth] == 1).all()


@pytest.mark.usefixtures("short_pieces")
def test_pieces_of_a_tile_have_slots_in_order():
    made = schedule(blocks_of(LAYOUTS["several blocks"]), *SMALL, kv_heads=1)
    by_tile = {}
    for first, _, low, _, _, _, slot, _ in made.units:
        by_tile.setdefault(first, []).append((low, slot))
    split = {first: sorted(pieces) for first, pieces in by_tile.items() if len(pieces) > 1}
    assert split and {slot for _, slot in sum(split.values(), [])} == set(range(made.slots))
    assert all(slot == -1 for pieces in by_tile.values() if len(pieces) == 1 for _, slot in pieces)
    sums = {first: (slot, count) for first, _, slot, count in made.sums}
    for first, pieces in split.items():
        slot, count = sums.pop(first)
        assert [number for _, number in pieces] == list(range(slot, slot + count))
    assert not sums


def test_the_longest_work_comes_first():
    made = schedule(blocks_of([(40, [50, 3, 60, 2])]), *SMALL, kv_heads=2)
    rows = made.units[:, 3] - made.units[:, 2]
    assert (np.diff(rows) <= 0).all()
    forward = SMALL[0].keys
    tiles = made.queries.astype(int)
    shared, own = tiles[:, 3] - tiles[:, 2], tiles[:, 1] - tiles[:, 4]
    assert (np.diff(np.ceil(shared / forward) + np.ceil(own / forward)) <= 0).all()


def test_slots_stay_bounded_when_rows_grow():
    sizes = (Sizes(128, 64), Sizes(128, 64), Sizes(64, 128))
    for completions in (128, 2048):
        layout = [(512, [1024] * completions)]
        made = schedule(blocks_of(layout), *sizes, kv_heads=2)
        assert 4 <= len(made.sums) <= 5
        assert 64 <= made.slots <= attention_schedule.UNITS
