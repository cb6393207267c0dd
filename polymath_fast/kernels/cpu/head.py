"""The LM head on a CPU: log-probs block by block, and their gradient in two dense products.

A block of rows is multiplied out to fp32 logits in a buffer that stays near the processor's last
cache; a compiled pass takes log-probs and entropies from it, and, once the loss has said what each
row's coefficient is, a second pass writes the gradient of the rows that have one, in bf16 and
without gaps, to a larger buffer. When that is full, two products turn it into the gradients of
`hidden` and `weight`. Logits are never stored for longer than a block, and rows that carry no
gradient cost no product.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from polymath_fast.kernels.cpu import rows
from polymath_fast.kernels.cpu.products import bits, padded_rows, products_for
from polymath_fast.kernels.cpu.threads import parallel, split
from polymath_fast.kernels.cpu.workspace import buffer

LOGITS_BYTES = 24 * 2**20
"""of fp32 logits at a time; about a last-level cache"""
SLOPES_BYTES = 192 * 2**20
"""of gradient rows at a time; more of them means fewer sums over the weight's gradient"""


class Head:
    """One pass over rows of an LM head.

    Args:
        hidden: (N, H); weight: (V, H); bias: (V,) or None; targets: (N,) int64 in [0, V).
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.products = products_for(weight)
        self.scale = np.float32(1 / temperature)
        self.targets = np.ascontiguousarray(targets.numpy())
        self.vocab = weight.shape[0]
        self._bias = (torch.empty(0) if bias is None else bias.float().contiguous()).numpy()
        count = hidden.shape[0]
        self.found = torch.empty(4, count, dtype=torch.float64)
        self.block = _rows_that_fit(LOGITS_BYTES, 4 * self.vocab, count)

    @property
    def logprobs(self) -> torch.Tensor:
        """(N,) fp32, of the blocks that were visited."""
        return self.found[0].float()

    @property
    def entropy(self) -> torch.Tensor:
        """(N,) fp32, of the blocks that were visited."""
        return self.found[1].float()

    def blocks(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(start, stop, logits) of every block; logits (rows, V + padding) fp32 until the next."""
        for start in range(0, self.hidden.shape[0], self.block):
            stop = min(start + self.block, self.hidden.shape[0])
            yield start, stop, self._logits(start, stop)

    def _logits(self, start: int, stop: int) -> torch.Tensor:
        width = odd_lines(self.vocab, 4)
        out = buffer("logits", (self.block, width), torch.float32)[: stop - start]
        self.products.logits(self.hidden[start:stop], out[:, : self.vocab])
        parallel(
            rows.head_statistics,
            split(stop - start),
            out.numpy(),
            self.vocab,
            self._bias,
            self.targets[start:stop],
            self.scale,
            self.found[:, start:stop].numpy(),
        )
        return out


class HeadGradient:
    """Collects gradient rows of the logits and turns them into the gradients of the inputs."""

    def __init__(self, head: Head, needs: tuple[bool, bool, bool]) -> None:
        """needs: whether hidden, weight and bias want a gradient."""
        self.head = head
        hidden, weight = head.hidden, head.weight
        self.d_hidden = torch.zeros_like(hidden) if needs[0] else None
        self._d_weight = (
            buffer("weight_gradient", tuple(weight.shape), torch.float32) if needs[1] else None
        )
        self._d_bias = torch.zeros(head.vocab) if needs[2] else None
        self._live: list[torch.Tensor] = []
        self._count = 0
        self._flushed = False
        dtype = head.products.slope_dtype
        width = odd_lines(head.vocab, dtype.itemsize)
        self._capacity = _rows_that_fit(
            SLOPES_BYTES, width * dtype.itemsize, padded_rows(hidden.shape[0])
        )
        self._capacity = max(self._capacity, padded_rows(head.block))
        self._slopes = buffer("slopes", (self._capacity, width), dtype)

    def add(
        self,
        start: int,
        logits: torch.Tensor,
        by_logprob: torch.Tensor,
        by_entropy: torch.Tensor | None,
    ) -> None:
        """Rows from `start` on, and the loss's derivatives by their log-probs and entropies."""
        stop = start + len(logits)
        by_entropy = torch.zeros_like(by_logprob) if by_entropy is None else by_entropy
        sound = self.head.found[:2, start:stop].isfinite().all(0)
        index = ((by_logprob != 0) | (by_entropy != 0)).logical_and_(sound).nonzero()[:, 0]
        if self._count + len(index) > self._capacity:
            self._flush()
        parallel(
            rows.head_slopes,
            split(len(index)),
            logits.numpy(),
            self.head.vocab,
            index.numpy(),
            self.head.targets[start:stop],
            self.head.scale,
            self.head.found[:, start:stop].numpy(),
            by_logprob.float().numpy(),
            by_entropy.float().numpy(),
            self._count,
            bits(self._slopes),
        )
        self._live.append(index + start)
        self._count += len(index)

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Gradients of hidden, weight and bias, in their dtypes; None where none is wanted."""
        self._flush()
        weight, bias = self.head.weight, self.head.bias
        d_weight = d_bias = None
        if self._d_weight is not None:
            d_weight = (
                self._d_weight.to(weight.dtype, copy=True)
                if self._flushed
                else torch.zeros_like(weight)
            )
        if self._d_bias is not None:
            d_bias = self._d_bias.to(bias.dtype)
        return self.d_hidden, d_weight, d_bias

    def _flush(self) -> None:
        if not self._count:
            return
        live = torch.cat(self._live)
        hidden = self.head.hidden[live]
        d_hidden = None
        if self.d_hidden is not None:
            d_hidden = buffer("hidden_gradient", tuple(hidden.shape), torch.float32)
        self.head.products.gradients(
            self._slopes, self._count, hidden, d_hidden, self._d_weight, self._flushed
        )
        if d_hidden is not None:
            self.d_hidden[live] = d_hidden.to(self.d_hidden.dtype)
        if self._d_bias is not None:
            self._d_bias += self._slopes[: self._count, : self.head.vocab].sum(
                0, dtype=torch.float32
            )
        self._live, self._count, self._flushed = [], 0, True


def head_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    by_logprob: torch.Tensor,
    by_entropy: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of hidden, weight and bias for known derivatives (N,) by log-prob and entropy.

    Logits are computed anew, of the rows that have a gradient only.
    """
    by_entropy = torch.zeros_like(by_logprob) if by_entropy is None else by_entropy
    live = ((by_logprob != 0) | (by_entropy != 0)).nonzero()[:, 0]
    by_logprob, by_entropy = by_logprob[live], by_entropy[live]
    head = Head(hidden[live], weight, bias, targets[live], temperature)
    gradient = HeadGradient(head, needs)
    for start, stop, logits in head.blocks():
        gradient.add(start, logits, by_logprob[start:stop], by_entropy[start:stop])
    some, d_weight, d_bias = gradient.finish()
    d_hidden = None
    if some is not None:
        d_hidden = torch.zeros_like(hidden)
        d_hidden[live] = some
    return d_hidden, d_weight, d_bias


def _rows_that_fit(budget: int, row_bytes: int, count: int) -> int:
    """Rows of a buffer: what the budget allows in whole tiles, at least a few tiles."""
    return min(max(budget // row_bytes // 8 * 8, 32), max(count, 1))


def odd_lines(columns: int, itemsize: int) -> int:
    """Columns of a padded row: an odd number of cache lines, so that rows spread over all sets."""
    lines = -(-(columns + columns % 2) * itemsize // 64) | 1
    return lines * 64 // itemsize
