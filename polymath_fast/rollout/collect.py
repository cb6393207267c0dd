"""One step's rollouts: which groups are asked, what was sampled, what it looks like in numbers."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from statistics import fmean, pstdev

from polymath_fast.config import Config
from polymath_fast.rewards import RewardResult
from polymath_fast.rollout import Engine
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
    on_finished: Callable[[Sample, Completion], None] | None = None,
) -> RolloutBatch:
    """Ask each sample for `num_generations` completions. Another `attempt` draws others.

    `on_finished` is called with every completion that the batch will hold, as it finishes.
    """
    sampling = SamplingOptions(
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        seed=derived_seed(config.seed, f"rollout/{attempt}" if attempt else "rollout", step),
    )
    needed = config.num_generations
    requests = [Request(prompt_ids=sample.prompt_ids, n=needed) for sample in samples]
    groups = [Group(sample=sample, completions=[]) for sample in samples]
    kept: list[dict[int, Completion]] = [{} for _ in samples]
    with closing(engine.stream(requests, sampling)) as stream:
        for number, index, completion in stream:
            kept[number][index] = completion
            if on_finished is not None:
                on_finished(samples[number], completion)
    for group, found in zip(groups, kept, strict=True):
        group.completions = [found[index] for index in sorted(found)]
    return RolloutBatch(groups=groups)


def rollout_metrics(batch: RolloutBatch) -> dict[str, float]:
    """Rewards and completions of one scored batch in numbers."""
    completions = batch.completions
    rewards = [r for group in batch.groups for r in group.rewards if r is not None]
    count = len(completions)
    return {
        "reward/mean": fmean(rewards),
        "reward/std": pstdev(rewards),
        "completion/mean_length": batch.num_tokens / count,
        "completion/truncated_ratio": fmean(c.finish_reason == "length" for c in completions),
        "completion/distinct_ratio": len({tuple(c.token_ids) for c in completions}) / count,
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
            flat += 1
    return rows
