"""Batches and evaluations of several processes, put together alike by all."""

from __future__ import annotations

import math

import pytest
from together import at_once

from polymath_fast.evaluation.grading import EvalResult
from polymath_fast.ranks import Ranks
from polymath_fast.ranks.pooling import pooled, pooled_evaluation
from polymath_fast.rewards import RewardResult
from polymath_fast.rollout.types import Completion, Group, RolloutBatch
from polymath_fast.samples import Sample

SAMPLES = [
    Sample(problem=p, prompt=p, answer="1", prompt_ids=(number,), columns={})
    for number, p in enumerate(("first", "second"))
]


def group(sample: Sample, rank: int, count: int) -> Group:
    """`count` completions that tell who drew them."""
    completions = [
        Completion(
            token_ids=[rank, sample.prompt_ids[0], index],
            sampling_logprobs=[-0.1 / 3, -1e-300, -math.pi],
            finish_reason="stop",
            weight_version=4,
        )
        for index in range(count)
    ]
    rewards = [None if index == 2 else rank + index / 10 for index in range(count)]
    return Group(
        sample=sample,
        completions=completions,
        dropped=[completions[0]] * rank,
        texts=[f"{sample.problem} {rank} {index}" for index in range(count)],
        rewards=rewards,
    )


def scores(batch: RolloutBatch, rank: int) -> RewardResult:
    total = [reward for group in batch.groups for reward in group.rewards]
    texts = [text for group in batch.groups for text in group.texts]
    return RewardResult(
        total=total,
        per_reward={"text": [hash(text) % 97 / 7 for text in texts]},
        metrics={"reward/excluded_ratio": float(rank)},
        notes=[f"note of {rank}"],
    )


def test_a_batch_is_put_together_alike_by_all(three: list[Ranks]) -> None:
    counts = {0: (3, 3), 1: (3, 2), 2: (2, 2)}
    recorded = object()

    def work(ranks: Ranks) -> tuple[RolloutBatch, RewardResult]:
        sizes = counts[ranks.rank]
        groups = [group(s, ranks.rank, n) for s, n in zip(SAMPLES, sizes, strict=True)]
        object.__setattr__(groups[1].completions[1], "recorded", recorded)
        batch = RolloutBatch(groups=groups)
        return pooled(ranks, batch, scores(batch, ranks.rank))

    (batch, result), *others = at_once(three, work)
    assert [len(each.completions) for each in batch.groups] == [8, 7]
    for number, each in enumerate(batch.groups):
        assert each.sample is SAMPLES[number]
        drawn = [(c.token_ids[0], c.token_ids[2]) for c in each.completions]
        assert drawn == [(r, i) for r in range(3) for i in range(counts[r][number])]
        assert [c.rank for c in each.completions] == [rank for rank, _ in drawn]
        assert each.texts == [f"{each.sample.problem} {r} {i}" for r, i in drawn]
        assert each.rewards == [None if i == 2 else r + i / 10 for r, i in drawn]
        assert [c.rank for c in each.dropped] == [1, 2, 2]
        assert all(
            c.sampling_logprobs == [-0.1 / 3, -1e-300, -math.pi] and c.weight_version == 4
            for c in each.completions
        )
    texts = [text for each in batch.groups for text in each.texts]
    assert result.total == [reward for each in batch.groups for reward in each.rewards]
    assert result.per_reward["text"] == [hash(text) % 97 / 7 for text in texts]
    assert result.metrics["reward/excluded_ratio"] == pytest.approx((0 * 6 + 1 * 5 + 2 * 4) / 15)
    assert result.notes == ["note of 0", "note of 1", "note of 2"]
    for rank, (same, alike) in enumerate(others, start=1):
        assert same.groups == batch.groups and alike == result
        kept = [c for c in same.groups[1].completions if c.recorded is recorded]
        assert [(c.rank, c.token_ids[2]) for c in kept] == [(rank, 1)]


def test_an_evaluation_is_put_together_in_the_order_of_its_problems(three: list[Ranks]) -> None:
    problems = list("abcde")

    def work(ranks: Ranks) -> EvalResult:
        mine = problems[ranks.rank :: ranks.size]
        rows = [
            {"index": i, "attempt": attempt, "problem": problem}
            for i, problem in enumerate(mine)
            for attempt in range(2)
        ]
        return pooled_evaluation(ranks, EvalResult(rows=rows, timeouts=ranks.rank))

    for result in at_once(three, work):
        found = [(row["index"], row["attempt"], row["problem"]) for row in result.rows]
        assert found == [(i, a, p) for i, p in enumerate(problems) for a in range(2)]
        assert result.timeouts == 3
