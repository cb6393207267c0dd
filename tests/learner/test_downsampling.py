"""Maximum-variance down-sampling against brute force."""

from __future__ import annotations

import itertools
import math
import random
from statistics import pvariance

import pytest

from polymath_fast.config import Config
from polymath_fast.learner.downsampling import max_variance_subset, train_rewards
from polymath_fast.rollout.types import Completion, Group, RolloutBatch


@pytest.mark.parametrize("kind", ["binary", "few values", "any"])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_no_subset_has_more_variance(kind, count):
    source = random.Random(f"{kind}{count}")
    draw = {
        "binary": lambda: float(source.random() < 0.3),
        "few values": lambda: source.choice([0.0, 0.5, 1.0, -2.0]),
        "any": lambda: source.gauss(1e4, 1.0),
    }[kind]
    for _ in range(20):
        rewards = [draw() for _ in range(count)]
        for size in range(1, count + 1):
            chosen = max_variance_subset(rewards, size)
            assert chosen == sorted(set(chosen)) and len(chosen) == size
            best = max(map(pvariance, itertools.combinations(rewards, size)))
            assert pvariance([rewards[i] for i in chosen]) == pytest.approx(best, abs=1e-7)


def test_ties_are_even():
    assert max_variance_subset([1.0, 0.0, 1.0, 0.0, 1.0, 0.0], 4) == [1, 2, 3, 4]
    assert max_variance_subset([1.0] * 6, 2) == [0, 5]
    assert max_variance_subset([], 0) == []
    with pytest.raises(ValueError, match="from 0 to the 2 rewards"):
        max_variance_subset([1.0, 2.0], 3)


def group(rewards, reasons):
    completions = [
        Completion(token_ids=[1], sampling_logprobs=[-1.0], finish_reason=reason, weight_version=0)
        for reason in reasons
    ]
    return Group(sample=None, completions=completions, rewards=rewards)


def test_rewards_that_are_trained_on():
    first = group([1.0, 1.0, None, 0.0, 1.0], ["stop"] * 5)
    second = group([0.0, 9.0, 0.5, 1.0, None], ["stop", "length", "stop", "stop", "stop"])
    batch = RolloutBatch(groups=[first, second])

    def kept(**settings):
        return [i for i, r in enumerate(train_rewards(batch, Config(**settings))) if r == r]

    assert kept() == [0, 1, 3, 4, 5, 6, 7, 8]
    assert kept(num_train_generations=2) == [3, 4, 5, 6]
    # a completion that would be masked is never chosen
    masked = {"num_train_generations": 2, "mask_truncated_completions": True}
    assert kept(**masked) == [3, 4, 5, 8]
    assert kept(num_train_generations=4) == [0, 1, 3, 4, 5, 6, 7, 8]
    assert math.isnan(train_rewards(batch, Config())[2])
