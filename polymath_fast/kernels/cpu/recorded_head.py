"""The LM head of states whose softmax a sampler kept: what made it is not computed again.

Legend: N targets, S states that predict them, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polymath_fast.kernels.cpu import rows
from polymath_fast.kernels.cpu.head import Head
from polymath_fast.kernels.cpu.operands import bits
from polymath_fast.kernels.cpu.threads import parallel, split

_BLOCK = 512
"""rows at a time; any number does"""


class Recording(NamedTuple):
    """Where the distributions go that the next C tokens are drawn from, B rows of logits."""

    exponentials: Tensor
    """(rows, V + padding) of each logit's distance from the largest one, over the temperature"""
    kept: Tensor
    """(B,) int64, the row of `exponentials` for each row of logits; negative for none"""
    places: Tensor
    """(C,) int64, the row of `found` for each token; negative for none"""
    found: Tensor
    """(rows, 4) float64: log-prob of the token, entropy, sum of the exponentials, 1 - probability
    of the token"""

    @classmethod
    def nowhere(cls, rows: int, tokens: int) -> Recording:
        """For a draw of which nothing is kept."""
        kept, found = (torch.empty(0, 0, dtype=kind) for kind in (torch.bfloat16, torch.float64))
        return cls(kept, torch.full((rows,), -1), torch.full((tokens,), -1), found)


class RecordedPredictions(NamedTuple):
    """What was kept of N tokens, see `Recording`."""

    exponentials: Tensor
    rows: Tensor
    """(N,) int64, of `exponentials`; tokens that were drawn from one distribution may share one"""
    found: Tensor
    """(N, 4) float64"""
    temperature: float

    @classmethod
    def joined(cls, parts: Sequence[RecordedPredictions]) -> RecordedPredictions:
        """Of several completions, sampled with the same weights at one temperature."""
        rows, found = (torch.cat([part[i] for part in parts]) for i in (1, 2))
        return cls(parts[0].exponentials, rows, found, parts[0].temperature)


class RecordedHead(Head):
    """With all its statistics from the beginning, and exponentials in place of logits.

    Its rows are S states, each of which is multiplied once for all the targets that it predicts.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        recorded: RecordedPredictions,
        states: Tensor,
    ):
        """`hidden` (S, H); targets (N,) are predicted by its rows `states` (N,), each by one at
        least."""
        super().__init__(hidden, weight, bias, targets, recorded.temperature)
        self.block = _BLOCK
        self.found = recorded.found.T.contiguous()  # (4, N)
        self._exponentials = bits(recorded.exponentials)
        self._states = states
        self._order = states.argsort(stable=True)
        self._bounds = torch.searchsorted(states[self._order], torch.arange(len(hidden) + 1))
        self._firsts = self._order[self._bounds[:-1]]  # (S,) a target of each state
        self._rows = recorded.rows[self._firsts]
        self._by_logprob = torch.zeros(len(targets), dtype=torch.float32)

    def by_state(self, by_logprob: Tensor) -> Tensor:
        """Take the loss's derivatives by the log-probs (N,), for `slopes`; (S,) the largest
        absolute one of each state."""
        self._by_logprob = by_logprob.float()
        largest = torch.zeros(len(self._rows), dtype=torch.float32)
        return largest.scatter_reduce_(0, self._states, self._by_logprob.abs(), "amax")

    def sound(self, start: int, stop: int) -> Tensor:
        """As that of `head.Head`."""
        return self.found[:2, self._firsts[start:stop]].isfinite()

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of every block."""
        for start in range(0, len(self._rows), self.block):
            yield start, min(start + self.block, len(self._rows))

    def slopes(
        self,
        start: int,
        index: Tensor,
        by_logprob: Tensor,
        by_entropy: Tensor,
        first: int,
        out: Tensor,
    ) -> None:
        """As those of `head.Head`, by what `by_state` was given; `by_entropy`, which would need
        logits, must be 0."""
        if by_entropy.any():
            raise ValueError("recorded predictions have no gradient of an entropy bonus")
        parallel(
            rows.recorded_slopes,
            split(len(index)),
            self._exponentials,
            self.vocab,
            self._rows.numpy(),
            (index + start).numpy(),
            self._order.numpy(),
            self._bounds.numpy(),
            self.targets,
            self.scale,
            self.found.numpy(),
            self._by_logprob.numpy(),
            first,
            bits(out),
        )
