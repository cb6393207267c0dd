"""What is drafted, and when: the last completions of a batch, from what others have in common.

When it pays: a pass over R rows reads the weights once and multiplies 2 R numbers by each of them,
so it takes the time of one row until R is peak / bandwidth (FLOP per byte, times 2 for float32):
about 16 rows in float32 on a CPU, 30 with bfloat16 instructions, 184 on an H200. Above, a drafted
token costs as much as a sampled one and is sometimes wrong. Hence nothing is drafted before so few
completions are left that each of them may have two rows, and never more than fill these rows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from polymath_fast.ranks import ALONE, Ranks
from polymath_fast.rollout.history import History, NGramTable, context_of, draft
from polymath_fast.rollout.types import RolloutBatch

_GROWTH = 1.25  # of a batch's tokens, after which what is known of them is brought up to date


def pass_rows(device: str, dtype: str) -> int:
    """Rows of a pass that cost hardly more than one, so as many as drafts may fill."""
    if device != "cpu":
        return 128
    return 32 if dtype == "bfloat16" else 16


class Speculation:
    """`--speculate`: what is remembered from step to step, and how well drafts did."""

    def __init__(self, most: int = 0, rows: int = 16):
        """`most` tokens are drafted per completion and pass, 0 for none; see `pass_rows`."""
        self.most, self.rows = most, rows
        self.history = History()
        self._call = History(steps=None)
        self._counts: Counter[str] = Counter()

    def begins(self, live: int) -> bool:
        """Whether so few completions are left that drafts may pay."""
        return self.most > 0 and 2 * live <= self.rows

    def start_call(self) -> None:
        """Completions sampled from here on are of the same weights, the best history there is."""
        self._call = History(steps=None)

    def sampled(
        self, prompts: Iterable[Sequence[int]], completions: Iterable[Sequence[int]]
    ) -> None:
        """Remember a wave's token ids until the next call; completions[i] continues prompts[i]."""
        if self.most:
            _remember(self._call, prompts, completions)

    def tables(self, prompt_ids: Sequence[int]) -> list[NGramTable]:
        """All that is known of completions of a prompt that have ended."""
        found = [history.table(prompt_ids) for history in (self._call, self.history)]
        return [table for table in found if table is not None]

    def count(self, drafted: int, accepted: int, drawn: int) -> None:
        """One verification: of `drafted` tokens, `accepted` were right; `drawn` came out of it."""
        if drafted:
            self._counts.update(verified=1, drafted=drafted, accepted=accepted, drawn=drawn)

    def start_step(self) -> None:
        """Count from zero."""
        self._counts.clear()

    def metrics(self, batch: RolloutBatch, ranks: Ranks = ALONE) -> dict[str, float]:
        """How well everybody's drafts did since `start_step`; all processes have to call it."""
        if not self.most:
            return {}
        counts = sum(map(Counter, ranks.gather(self._counts)), Counter())
        found: dict[str, float] = {
            "speculation/drafted": counts["drafted"],
            "speculation/saved_ratio": counts["accepted"] / batch.num_tokens,
        }
        if counts["verified"]:
            found["speculation/acceptance_length"] = counts["drawn"] / counts["verified"]
            found["speculation/accepted_ratio"] = counts["accepted"] / counts["drafted"]
        return found

    def end_step(self, batch: RolloutBatch) -> None:
        """Remember the completions of a step that is done: one that is not is drawn again."""
        if self.most:
            prompts = [group.sample.prompt_ids for group in batch.groups for _ in group.completions]
            _remember(self.history, prompts, [c.token_ids for c in batch.completions])

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint: a resumed run drafts the same, so its products round the same."""
        return self.history.tensors() if self.most else {}

    def load(self, tensors: Mapping[str, Any]) -> None:
        """Take over what `tensors` wrote, if this run drafts at all."""
        if self.most:
            self.history.load(tensors)


def _remember(
    history: History, prompts: Iterable[Sequence[int]], completions: Iterable[Sequence[int]]
) -> None:
    alike: dict[tuple[int, ...], list[Sequence[int]]] = defaultdict(list)
    for prompt_ids, completion in zip(prompts, completions, strict=True):
        alike[tuple(prompt_ids)].append(completion)
    for prompt_ids, lists in alike.items():
        history.add(prompt_ids, lists)


class Drafter:
    """Drafts for the completions that are left of one batch: B of them, fewer and fewer."""

    def __init__(self, speculation: Speculation):
        self._speculation = speculation
        self._fresh: dict[tuple[int, ...], NGramTable] = {}
        self._outdated = 0.0  # tokens of the batch from which `_fresh` is made anew

    def learn(
        self, tokens: int, drawn: Callable[[], Iterable[tuple[Sequence[int], Sequence[int]]]]
    ) -> None:
        """`drawn`: prompts and what followed so far, `tokens` in all. It is asked whenever there
        are a quarter more of them than last time."""
        if tokens < self._outdated:
            return
        self._outdated = _GROWTH * tokens
        alike: dict[tuple[int, ...], list[Sequence[int]]] = defaultdict(list)
        for prompt_ids, completion in drawn():
            alike[tuple(prompt_ids)].append(completion)
        self._fresh = {prompt: NGramTable(prompt, lists) for prompt, lists in alike.items()}

    def drafts(
        self, prompts: Sequence[Sequence[int]], drawn: Sequence[Sequence[int]], room: np.ndarray
    ) -> list[list[int]]:
        """Tokens that may follow each completion, of all that could be drafted the surest.

        prompts and drawn: of the B completions; room (B,): tokens that may be drafted at most.
        """
        most = self._speculation.most
        tokens = np.zeros((len(prompts), most), np.int64)
        chances = np.zeros((len(prompts), most))
        keys = [tuple(prompt_ids) for prompt_ids in prompts]
        for prompt in dict.fromkeys(keys):
            chosen = [i for i, key in enumerate(keys) if key == prompt]
            contexts = np.array([context_of([*prompt, *drawn[i]]) for i in chosen])
            known = [self._fresh[prompt]] if prompt in self._fresh else []
            tables = known + self._speculation.tables(prompt)
            tokens[chosen], chances[chosen] = draft(tables, contexts, most)
        chances[np.arange(most) >= room[:, None]] = 0
        lengths = surest(chances, self._speculation.rows - len(prompts))
        return [tokens[i, :length].tolist() for i, length in enumerate(lengths)]


def surest(chances: np.ndarray, budget: int) -> np.ndarray:
    """Length of each draft when `budget` tokens may be drafted in all.

    chances (B, T) fall from left to right, so the largest of all are the beginnings of rows.
    """
    flat = chances.T.ravel()
    chosen = np.zeros(len(flat), bool)
    chosen[np.argsort(-flat, kind="stable")[: max(0, budget)]] = True
    return (chosen & (flat > 0)).reshape(chances.T.shape).sum(0)
