"""The last completions of a wave, drafted and verified several tokens a pass.

Exact by construction: the t-th token of a completion is drawn from the model's own logits with the
uniform number that belongs to it and to t, whatever was drafted. A draft is accepted while the
drawn tokens are the drafted ones, so it changes the number of passes and no token (but for the
rounding of products of another shape).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from polymath_fast.rollout.speculation import Drafter, Speculation
from polymath_fast.rollout.wave import Wave


class BlockDecoder(Protocol):
    """B completions that grow by blocks of tokens."""

    def block(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """(R, V or more) logits after each of tokens (R,), counts (B,) of them a completion."""

    def advance(self, kept: Tensor) -> None:
        """Keep the first kept (B,) tokens of each completion's block."""

    def keep(self, rows: Tensor) -> None:
        """Drop all completions but `rows` (indices into the present batch)."""


class Tail:
    """The completions of a wave that have not ended when few of them are left."""

    def __init__(self, speculation: Speculation, decoder: BlockDecoder, wave: Wave, rows: Tensor):
        """`rows` (B,) of the wave are in the decoder, which has read all but their last token."""
        self.rows = rows
        self._speculation, self._decoder, self._wave = speculation, decoder, wave
        self._drafter = Drafter(speculation)

    def step(self) -> dict[int, str]:
        """One pass over all that is left; rows of the wave that ended with it, and why."""
        rows, drafts = self.rows, self._drafts()
        counts = torch.tensor([1 + len(drafted) for drafted in drafts])
        last = self._wave.tokens[rows, self._wave.lengths[rows] - 1].tolist()
        blocks = [[token, *drafted] for token, drafted in zip(last, drafts, strict=True)]
        inputs = torch.tensor([token for block in blocks for token in block])
        owner = torch.arange(len(rows)).repeat_interleave(counts)
        first = counts.cumsum(0) - counts
        places = self._wave.lengths[rows][owner] + torch.arange(len(owner)) - first[owner]
        self._wave.follow(rows, torch.arange(len(rows)))
        logits = self._decoder.block(inputs, counts)
        each = torch.arange(len(owner))
        drawn, logprobs = self._wave.draw(logits, rows[owner], places, each)
        ended: dict[int, str] = {}
        kept = torch.zeros_like(counts)
        for i, drafted in enumerate(drafts):
            span = slice(int(first[i]), int(first[i] + counts[i]))
            kept[i] = self._take(rows[i : i + 1], drawn[span], logprobs[span], drafted, ended)
        self._decoder.advance(kept)
        return ended

    def keep(self, going: Tensor) -> None:
        """Go on with rows[going] alone."""
        self.rows = self.rows[going]
        if len(going):
            self._decoder.keep(going)

    def _take(
        self,
        row: Tensor,
        drawn: Tensor,
        logprobs: Tensor,
        drafted: Sequence[int],
        ended: dict[int, str],
    ) -> int:
        """How many of a row's drawn tokens stand.

        drawn[j] follows the first j drafted tokens, so it stands while these are what was drawn,
        and up to the first that ends the completion.
        """
        accepted = 0
        for j in range(len(drawn)):
            now = self._wave.append(row, drawn[j : j + 1], logprobs[j : j + 1])
            ended |= now
            right = j < len(drafted) and int(drawn[j]) == drafted[j]
            accepted += right
            if now or not right:
                break
        self._speculation.count(len(drafted), accepted, j + 1)
        return j + 1

    def _drafts(self) -> list[list[int]]:
        wave, rows = self._wave, self.rows.tolist()
        self._drafter.learn(int(wave.lengths.sum()), self._drawn)
        # The last token of all is drawn, not drafted.
        room = np.array([wave.left(row) - 1 for row in rows])
        prompts = [wave.slots[row].prompt for row in rows]
        return self._drafter.drafts(prompts, [wave.so_far(row) for row in rows], room)

    def _drawn(self) -> Iterable[tuple[Sequence[int], Sequence[int]]]:
        """Of the prompts that are left, also the completions that have ended."""
        wave = self._wave
        left = {wave.slots[row].prompt for row in self.rows.tolist()}
        for row, slot in enumerate(wave.slots):
            if slot.prompt in left:
                yield slot.prompt, wave.so_far(row)
