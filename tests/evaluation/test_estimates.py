"""mean@k, pass@k and their intervals."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from polymath_fast.evaluation.estimates import estimate, pass_at_k, wilson


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for n, c in itertools.product(range(1, 7), range(7)):
        if c > n:
            continue
        completions = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            draws = [any(draw) for draw in itertools.combinations(completions, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws))
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)


def test_wilson_interval_solves_its_equation():
    for share, size in [(0.0, 30), (0.375, 40), (0.5, 8), (1.0, 500)]:
        for bound in wilson(share, size):
            distance = abs(bound - share) - 1.959964 * math.sqrt(bound * (1 - bound) / size)
            assert distance == pytest.approx(0.0, abs=1e-9) or bound in (0.0, 1.0)
    assert wilson(0.375, 40) == pytest.approx((0.2422, 0.5297), abs=1e-4)


def test_interval_of_clustered_completions():
    same = estimate([1.0, 0.0] * 20, 8)
    assert (same.low, same.high) == wilson(0.5, 40), "completions that agree count once"
    mixed = estimate([0.5] * 40, 8)
    assert (mixed.low, mixed.high) == wilson(0.5, 320), "at most every completion counts"
    once = estimate([1.0] * 15 + [0.0] * 25, 1)
    assert (once.low, once.high) == wilson(0.375, 40)


def test_intervals_cover_the_truth():
    generator, covered, runs = random.Random(0), 0, 400
    for _ in range(runs):
        chances = [generator.betavariate(0.5, 0.5) for _ in range(40)]
        means = [sum(generator.random() < p for _ in range(8)) / 8 for p in chances]
        interval = estimate(means, 8)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.92 <= covered / runs <= 0.99
