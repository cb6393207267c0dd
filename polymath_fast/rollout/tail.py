"""The last completions of a wave, drafted and verified several tokens a pass.

Exact by construction: token t of completion i is drawn from the model's own logits with the uniform
number that belongs to (i, t), whatever was drafted. A draft is accepted while the drawn tokens are
the drafted ones, so it changes the number of passes and no token (but for the rounding of products
of another shape).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from polymath_fast.rollout.speculation import Drafter, Speculation


class BlockDecoder(Protocol):
    """B completions that grow by blocks of tokens."""

    def block(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """(R, V or more) logits after each of tokens (R,), counts (B,) of them a completion."""

    def advance(self, kept: Tensor) -> None:
        """Keep the first kept (B,) tokens of each completion's block."""

    def keep(self, rows: Tensor) -> None:
        """Drop all completions but `rows` (indices into the present batch)."""


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
        self._drafter = Drafter(speculation)

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
                self._rows = self._rows[going]
                if len(going):
                    self._decoder.keep(going)
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
        wave, rows = self._wave, self._rows.tolist()
        self._drafter.learn(int(wave.lengths.sum()), self._drawn)
        # The last token of all is drawn, not drafted.
        room = wave.tokens.shape[1] - 1 - wave.lengths[self._rows]
        prompts = [wave.prompts[row] for row in rows]
        drawn = [wave.tokens[row, : wave.lengths[row]].tolist() for row in rows]
        return self._drafter.drafts(prompts, drawn, room.numpy())

    def _drawn(self) -> Iterable[tuple[Sequence[int], Sequence[int]]]:
        """Of the prompts that are left, also the completions that have ended."""
        wave = self._wave
        left = {tuple(wave.prompts[row]) for row in self._rows.tolist()}
        for row, prompt_ids in enumerate(wave.prompts):
            if tuple(prompt_ids) in left:
                yield prompt_ids, wave.tokens[row, : wave.lengths[row]].numpy()


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
