"""The rolling check against looking at the whole tail every time."""

from __future__ import annotations

import pytest
import torch

from polymath_fast.rollout.repetition import RepetitionWatch


def has_loop(ids, times, period):
    return any(
        len(ids) >= p * times and ids[-p * times :] == ids[-p:] * times
        for p in range(1, period + 1)
    )


@pytest.mark.parametrize(("times", "period"), [(2, 1), (2, 3), (3, 4), (5, 2), (4, 40)])
def test_finds_what_a_look_at_the_tail_finds(times, period):
    generator = torch.Generator().manual_seed(times)
    tokens = torch.randint(2, (12, 30), generator=generator)
    tokens[0], tokens[1], tokens[2] = 1, torch.arange(30) % 3, torch.arange(30) % 4
    watch, found = RepetitionWatch(12, times, period), 0
    rows = torch.arange(12)
    for step in range(30):
        if step == 10:
            rows = rows[rows % 3 != 1]  # rows may leave
        truth = [has_loop(tokens[row, : step + 1].tolist(), times, period) for row in rows]
        assert watch.looped(tokens, rows, step).tolist() == truth
        found += sum(truth)
    assert found


def test_no_pattern_is_found_where_there_is_none():
    tokens = torch.arange(64)[None]
    watch = RepetitionWatch(1, 2, 16)
    assert not any(watch.looped(tokens, torch.tensor([0]), step)[0] for step in range(64))
