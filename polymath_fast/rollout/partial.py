"""Aborted completions that later steps go on with (--partial-rollouts)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from polymath_fast.rollout.types import Completion, RolloutBatch
from polymath_fast.rollout.wire import decode, encode
from polymath_fast.samples import Sample

Prompt = tuple[int, ...]


class Pending:
    """What is left of earlier steps, by prompt. Never changed in place: a step that fails loses
    nothing, and a checkpoint holds what the next step begins with."""

    def __init__(self, completions: Mapping[Prompt, Sequence[Completion]] | None = None) -> None:
        self._completions = dict(completions or {})

    def __len__(self) -> int:
        return sum(map(len, self._completions.values()))

    def shares(self, samples: Sequence[Sample], most: int) -> list[list[Completion]]:
        """What the group of each sample goes on with, at most `most` completions; groups of one
        prompt take turns."""
        groups = Counter(sample.prompt_ids for sample in samples)
        seen: Counter[Prompt] = Counter()
        shares = []
        for sample in samples:
            prompt = sample.prompt_ids
            left = self._completions.get(prompt, ())
            shares.append(list(left[seen[prompt] :: groups[prompt]])[:most])
            seen[prompt] += 1
        return shares

    def after(self, batch: RolloutBatch, most: int) -> Pending:
        """What is left after `batch`, whose groups took their `shares` with the same `most`."""
        samples = [group.sample for group in batch.groups]
        groups = Counter(sample.prompt_ids for sample in samples)
        left = dict(self._completions)
        for prompt, count in groups.items():
            left[prompt] = list(left.get(prompt, ()))[count * most :]
        for group in batch.groups:
            aborted = [c for c in group.dropped if c.finish_reason == "aborted" and c.token_ids]
            left[group.sample.prompt_ids] += aborted
        return Pending({prompt: each for prompt, each in left.items() if each})

    def to_json(self) -> list[Any]:
        """As a checkpoint keeps it."""
        return [
            [list(prompt), [encode(completion) for completion in each]]
            for prompt, each in self._completions.items()
        ]

    @classmethod
    def from_json(cls, data: Sequence[Any], max_completion_length: int) -> Pending:
        """What `to_json` gave, without completions that have no token left."""
        found = {
            tuple(prompt): [
                completion
                for completion in map(decode, each)
                if len(completion.token_ids) < max_completion_length
            ]
            for prompt, each in data
        }
        return cls({prompt: each for prompt, each in found.items() if each})


NOTHING = Pending()
