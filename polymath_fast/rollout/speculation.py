"""Drafts from history, verified several tokens a pass: the last completions of a wave end sooner.

Exact by construction: token t of completion i is drawn from the model's own logits with the uniform
number that belongs to (i, t), whatever was drafted. A draft is accepted while the drawn tokens are
the drafted ones, so it changes the number of passes and no token (but for the rounding of products
of another shape).

When it pays: a pass over R rows reads the weights once and multiplies 2 R numbers by each of them,
so it takes the time of one row until R is peak / bandwidth (FLOP per byte, times 2 for float32):
about 16 rows in float32 on a CPU, 30 with bfloat16 instructions, 184 on an H200. Above, a drafted
token costs as much as a sampled one and is sometimes wrong. Hence nothing is drafted before so few
completions are left that each of them may have two rows, and never more than fill these rows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from polymath_fast.rollout.history import History, NGramTable, context_of, draft
from polymath_fast.rollout.types import Completion, RolloutBatch

_GROWTH = 1.25  # of a wave's tokens, after which what is known of them is brought up to date


def pass_rows(device: str, dtype: str) -> int:
    """Rows of a pass that cost hardly more than one, so as many as drafts may fill."""
    if device != "cpu":
        return 128
    return 32 if dtype == "bfloat16" else 16


class BlockDecoder(Protocol):
    """B completions that grow by blocks of tokens."""

    def block(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """(R, V or more) logits after each of tokens (R,), counts (B,) of them a completion."""

    def advance(self, kept: Tensor) -> None:
        """Keep the first kept (B,) tokens of each completion's block."""

    def keep(self, rows: Tensor) -> None:
        """Drop all completions but `rows` (indices into the present batch)."""


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

    def sampled(self, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> None:
        """Remember a wave until the next call; completion i continues prompts[i]."""
        _remember(self._call if self.most else None, prompts, completions)

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

    def end_step(self, batch: RolloutBatch) -> dict[str, float]:
        """Remember the completions of a step; its metrics."""
        if not self.most:
            return {}
        prompts = [group.sample.prompt_ids for group in batch.groups for _ in group.completions]
        _remember(self.history, prompts, batch.completions)
        counts = self._counts
        found: dict[str, float] = {
            "speculation/drafted": counts["drafted"],
            "speculation/saved_ratio": counts["accepted"] / batch.num_tokens,
        }
        if counts["verified"]:
            found["speculation/acceptance_length"] = counts["drawn"] / counts["verified"]
            found["speculation/accepted_ratio"] = counts["accepted"] / counts["drafted"]
        return found

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint: a resumed run drafts the same, so its products round the same."""
        return self.history.tensors() if self.most else {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` wrote, if this run drafts at all."""
        if self.most:
            self.history.load(tensors)


def _remember(
    history: History | None,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
) -> None:
    if history is None:
        return
    alike: dict[tuple[int, ...], list[Sequence[int]]] = defaultdict(list)
    for prompt_ids, completion in zip(prompts, completions, strict=True):
        alike[tuple(prompt_ids)].append(completion.token_ids)
    for prompt_ids, lists in alike.items():
        history.add(prompt_ids, lists)


@dataclass
class Wave:
    """Completions that decode together: W of them, of at most L tokens."""

    prompts: Sequence[Sequence[int]]
    """(W,) what each continues"""
    tokens: Tensor
    """(W, L) int64"""
    logprobs: Tensor
    """(W, L) float32"""
    lengths: Tensor
    """(W,) tokens drawn so far"""
    stop: frozenset[int]
    """ids that end a completion"""
    draw: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """logits (R, V), completions (R,), positions (R,) -> tokens and log-probs (R,), on the CPU"""


class Tail:
    """The completions of a wave that have not ended when few of them are left."""

    def __init__(self, speculation: Speculation, decoder: BlockDecoder, wave: Wave, rows: Tensor):
        """`rows` (B,) of the wave are in the decoder, which has read all but their last token."""
        self._speculation, self._decoder, self._wave, self._rows = speculation, decoder, wave, rows
        self._members: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row, prompt_ids in enumerate(wave.prompts):
            self._members[tuple(prompt_ids)].append(row)
        self._fresh: dict[tuple[int, ...], NGramTable] = {}
        self._outdated = 0.0  # tokens of the wave from which `_fresh` is made anew

    def run(self) -> Iterator[list[int]]:
        """Draw to the end; yields the rows of the wave that a pass has ended."""
        wave = self._wave
        while len(self._rows):
            drafts = self._drafts()
            kept = self._verify(drafts)
            self._decoder.advance(kept)
            ended = torch.tensor(
                [
                    int(wave.lengths[row]) == wave.tokens.shape[1]
                    or int(wave.tokens[row, wave.lengths[row] - 1]) in wave.stop
                    for row in self._rows
                ]
            )
            if ended.any():
                done, going = self._rows[ended].tolist(), (~ended).nonzero()[:, 0]
                self._decoder.keep(going)
                self._rows = self._rows[going]
                yield done

    def _verify(self, drafts: list[list[int]]) -> Tensor:
        """Draw after the last token and after each drafted one; how many stand, a row."""
        wave, rows = self._wave, self._rows
        counts = torch.tensor([1 + len(drafted) for drafted in drafts])
        last = wave.tokens[rows, wave.lengths[rows] - 1].tolist()
        blocks = [[token, *drafted] for token, drafted in zip(last, drafts, strict=True)]
        inputs = torch.tensor([token for block in blocks for token in block])
        owner = torch.arange(len(rows)).repeat_interleave(counts)
        first = counts.cumsum(0) - counts
        positions = wave.lengths[rows][owner] + torch.arange(len(owner)) - first[owner]
        logits = self._decoder.block(inputs, counts)
        drawn, logprobs = wave.draw(logits, rows[owner], positions)
        kept = torch.zeros_like(counts)
        for i, (row, drafted) in enumerate(zip(rows.tolist(), drafts, strict=True)):
            start, span = int(wave.lengths[row]), slice(int(first[i]), int(first[i] + counts[i]))
            kept[i], accepted = standing(drawn[span].tolist(), drafted, wave.stop)
            end = start + int(kept[i])
            wave.tokens[row, start:end] = drawn[span][: kept[i]]
            wave.logprobs[row, start:end] = logprobs[span][: kept[i]]
            wave.lengths[row] = end
            self._speculation.count(len(drafted), accepted, int(kept[i]))
        return kept

    def _drafts(self) -> list[list[int]]:
        """Drafted tokens of every row, of all that could be drafted the surest."""
        wave, rows, most = self._wave, self._rows.tolist(), self._speculation.most
        self._refresh()
        tokens = np.zeros((len(rows), most), np.int64)
        chances = np.zeros((len(rows), most))
        for prompt_ids in dict.fromkeys(tuple(wave.prompts[row]) for row in rows):
            chosen = [i for i, row in enumerate(rows) if tuple(wave.prompts[row]) == prompt_ids]
            contexts = np.array([self._context(rows[i]) for i in chosen])
            tables = [self._fresh[prompt_ids], *self._speculation.tables(prompt_ids)]
            tokens[chosen], chances[chosen] = draft(tables, contexts, most)
        # The last token of all is drawn, not drafted.
        room = wave.tokens.shape[1] - 1 - wave.lengths[self._rows].numpy()
        chances[np.arange(most) >= room[:, None]] = 0
        lengths = surest(chances, self._speculation.rows - len(rows))
        return [tokens[i, :length].tolist() for i, length in enumerate(lengths)]

    def _context(self, row: int) -> list[int]:
        drawn = self._wave.tokens[row, : self._wave.lengths[row]].tolist()
        return context_of([*self._wave.prompts[row], *drawn])

    def _refresh(self) -> None:
        """What the wave itself has drawn, as a table, again each time that it has grown."""
        wave, total = self._wave, int(self._wave.lengths.sum())
        if total < self._outdated:
            return
        self._outdated = _GROWTH * total
        live = {tuple(wave.prompts[row]) for row in self._rows.tolist()}
        for prompt_ids in live:
            drawn = [wave.tokens[i, : wave.lengths[i]].numpy() for i in self._members[prompt_ids]]
            self._fresh[prompt_ids] = NGramTable(prompt_ids, drawn)


def standing(drawn: Sequence[int], drafted: Sequence[int], stop: frozenset[int]) -> tuple[int, int]:
    """How many of the drawn tokens stand, and how many drafted ones were right.

    drawn[j] follows the first j drafted tokens, so it stands while these were what was drawn, and
    up to the first that ends the completion.
    """
    for index, token in enumerate(drawn):
        right = index < len(drafted) and token == drafted[index]
        if token in stop or not right:
            return index + 1, index + right
    raise ValueError(f"{len(drawn)} tokens drawn for {len(drafted)} drafted ones; one more is due")


def surest(chances: np.ndarray, budget: int) -> np.ndarray:
    """Length of each draft when `budget` tokens may be drafted in all.

    chances (B, T) fall from left to right, so the largest of all are the beginnings of rows.
    """
    flat = chances.T.ravel()
    chosen = np.zeros(len(flat), bool)
    chosen[np.argsort(-flat, kind="stable")[: max(0, budget)]] = True
    return (chosen & (flat > 0)).reshape(chances.T.shape).sum(0)
