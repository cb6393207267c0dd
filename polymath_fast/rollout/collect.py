"""One step's rollouts: which groups are asked, what was sampled, what it looks like in numbers."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from statistics import fmean, pstdev

from polymath_fast.config import Config
from polymath_fast.ranks import ALONE, Ranks
from polymath_fast.rewards import RewardResult
from polymath_fast.rollout import Engine
from polymath_fast.rollout.partial import NOTHING, Pending
from polymath_fast.rollout.types import Completion, Group, Request, RolloutBatch, SamplingOptions
from polymath_fast.samples import Sample


def derived_seed(seed: int, purpose: str, step: int) -> int:
    """A 32-bit seed for one use in one step, so that a resumed run draws what it would have."""
    return zlib.crc32(f"{seed}/{purpose}/{step}".encode())


def samples_of_step(samples: Sequence[Sample], step: int, config: Config) -> list[Sample]:
    """The sample of every group of step 1, 2, ...: all are asked once before any is asked again."""
    first = (step - 1) * config.groups_per_step
    chosen = []
    for position in range(first, first + config.groups_per_step):
        epoch, index = divmod(position, len(samples))
        order = list(range(len(samples)))
        random.Random(f"{config.seed}/{epoch}").shuffle(order)
        chosen.append(samples[order[index]])
    return chosen


def sample_groups(
    engine: Engine,
    samples: Sequence[Sample],
    step: int,
    config: Config,
    attempt: int = 0,
    pending: Pending = NOTHING,
    on_finished: Callable[[Sample, Completion], None] | None = None,
    ranks: Ranks = ALONE,
) -> RolloutBatch:
    """Ask each sample for this process's part of a group of `num_generations` completions. Another
    `attempt` draws others.

    With `oversample` a group is the completions that finish first. `pending` are those that earlier
    steps aborted. `on_finished` is called with every completion of a group, as it finishes.
    """
    purpose = ranks.own(f"rollout/{attempt}" if attempt else "rollout")
    sampling = SamplingOptions(
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        stop_repetition=config.stop_repetition,
        repetition_period=config.repetition_period,
        seed=derived_seed(config.seed, purpose, step),
    )
    asked, needed = ranks.part(config.asked_generations), ranks.part(config.num_generations)
    shares = pending.shares(samples, config.asked_generations)
    requests = [
        Request(
            prompt_ids=sample.prompt_ids,
            n=asked,
            needed=needed,
            begun=begun[ranks.rank :: ranks.size],
        )
        for sample, begun in zip(samples, shares, strict=True)
    ]
    groups = [Group(sample=sample, completions=[]) for sample in samples]
    kept: list[dict[int, Completion]] = [{} for _ in samples]
    with closing(engine.stream(requests, sampling)) as stream:
        for number, index, completion in stream:
            if completion.finish_reason == "aborted" or len(kept[number]) == needed:
                groups[number].dropped.append(completion)
                continue
            kept[number][index] = completion
            if on_finished is not None:
                on_finished(samples[number], completion)
    for group, found in zip(groups, kept, strict=True):
        group.completions = [found[index] for index in sorted(found)]
    return RolloutBatch(groups=groups)


def rollout_metrics(batch: RolloutBatch, config: Config) -> dict[str, float]:
    """Rewards and completions of one scored batch in numbers."""
    completions = batch.completions
    rewards = [r for group in batch.groups for r in group.rewards if r is not None]
    count = len(completions)
    return {
        "reward/mean": fmean(rewards),
        "reward/std": pstdev(rewards),
        "completion/mean_length": batch.num_tokens / count,
        "completion/truncated_ratio": fmean(c.finish_reason == "length" for c in completions),
        "completion/repetition_ratio": fmean(c.finish_reason == "repetition" for c in completions),
        "completion/distinct_ratio": len({tuple(c.token_ids) for c in completions}) / count,
        **(_oversampling(batch) if config.oversample else {}),
        **(_staleness(batch) if config.partial_rollouts else {}),
    }


def _oversampling(batch: RolloutBatch) -> dict[str, float]:
    """What was left out because it took longer."""
    dropped = [completion for group in batch.groups for completion in group.dropped]
    lengths = [len(c.token_ids) for c in (*batch.completions, *dropped) if c.token_ids]
    return {
        "oversample/aborted": sum(c.finish_reason == "aborted" for c in dropped),
        "oversample/never_begun": sum(not c.token_ids for c in dropped),
        "oversample/mean_length_at_least": fmean(lengths),
    }


def _staleness(batch: RolloutBatch) -> dict[str, float]:
    """How much of the completions older weights drew."""
    newest = max(completion.weight_version for completion in batch.completions)
    stale = [
        (newest - version, count)
        for completion in batch.completions
        for version, count in completion.tokens_by_version
        if version < newest
    ]
    return {
        "partial/continued": sum(len(c.spans) > 1 for c in batch.completions),
        "partial/stale_token_ratio": sum(n for _, n in stale) / max(1, batch.num_tokens),
        "partial/stalest_token": max((lag for lag, _ in stale), default=0),
    }


def completion_rows(batch: RolloutBatch, result: RewardResult) -> list[dict]:
    """The batch as rows of completions.jsonl."""
    rows, flat = [], 0
    for number, group in enumerate(batch.groups):
        for index, completion in enumerate(group.completions):
            rows.append(
                {
                    "group": number,
                    "index": index,
                    "prompt": group.sample.prompt,
                    "answer": group.sample.answer,
                    "completion": group.texts[index],
                    "reward": group.rewards[index],
                    "rewards": {name: values[flat] for name, values in result.per_reward.items()},
                    "length": len(completion.token_ids),
                    "finish_reason": completion.finish_reason,
                    "weight_version": completion.weight_version,
                }
            )
            if len(completion.spans) > 1:
                rows[-1]["weight_versions"] = [list(span) for span in completion.spans]
            flat += 1
    return rows
