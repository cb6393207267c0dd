"""What several processes drew, put together so that each of them has it all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import reduce
from itertools import accumulate
from operator import add
from typing import Any

from polymath_fast.evaluation.grading import EvalResult
from polymath_fast.ranks.ranks import Ranks
from polymath_fast.rewards import RewardResult
from polymath_fast.rollout.types import Completion, Group, RolloutBatch
from polymath_fast.rollout.wire import decode, encode


def pooled(
    ranks: Ranks, batch: RolloutBatch, result: RewardResult
) -> tuple[RolloutBatch, RewardResult]:
    """The groups with everybody's completions, in the order of ranks, and their rewards. All
    processes asked the same samples."""
    if ranks.size == 1:
        return batch, result
    drawn = [_as_json(group) for group in batch.groups]
    everyone = ranks.gather({"groups": drawn, "result": asdict(result)})
    groups = [Group(sample=group.sample, completions=[]) for group in batch.groups]
    for rank, theirs in enumerate(everyone):
        for number, data in enumerate(theirs["groups"]):
            own = batch.groups[number] if rank == ranks.rank else None
            _extend(groups[number], data, rank, own)
    counts = [[len(data["texts"]) for data in theirs["groups"]] for theirs in everyone]
    results = [RewardResult(**theirs["result"]) for theirs in everyone]
    return RolloutBatch(groups=groups), _by_group(reduce(add, results), counts)


def pooled_evaluation(ranks: Ranks, result: EvalResult) -> EvalResult:
    """All problems of a set, of which rank r was given those at r, r + size, ..."""
    if ranks.size == 1:
        return result
    everyone = ranks.gather({"rows": result.rows, "timeouts": result.timeouts})
    rows = [
        row | {"index": row["index"] * ranks.size + rank}
        for rank, theirs in enumerate(everyone)
        for row in theirs["rows"]
    ]
    rows.sort(key=lambda row: (row["index"], row["attempt"]))
    return EvalResult(rows=rows, timeouts=sum(theirs["timeouts"] for theirs in everyone))


def _as_json(group: Group) -> dict[str, Any]:
    return {
        "completions": [encode(completion) for completion in group.completions],
        "dropped": [encode(completion) for completion in group.dropped],
        "texts": group.texts,
        "rewards": group.rewards,
    }


def _extend(group: Group, data: Mapping[str, Any], rank: int, own: Group | None) -> None:
    """Add what process `rank` drew of it. What is this process's `own` stays as it is: the tape
    knows it."""

    def of_rank(kind: str) -> list[Completion]:
        found = getattr(own, kind) if own else map(decode, data[kind])
        return [replace(completion, rank=rank) for completion in found]

    group.completions += of_rank("completions")
    group.dropped += of_rank("dropped")
    group.texts += data["texts"]
    group.rewards += data["rewards"]


def _by_group(result: RewardResult, counts: list[list[int]]) -> RewardResult:
    """`result` of completions rank by rank as one of completions group by group; `counts` has the
    number of each rank and group."""
    sizes = [count for of_rank in counts for count in of_rank]
    ends = list(accumulate(sizes))
    groups = len(counts[0])
    order = [
        index
        for number in range(groups)
        for place in range(number, len(sizes), groups)
        for index in range(ends[place] - sizes[place], ends[place])
    ]
    return replace(
        result,
        total=[result.total[index] for index in order],
        per_reward={
            name: [values[index] for index in order] for name, values in result.per_reward.items()
        },
    )
