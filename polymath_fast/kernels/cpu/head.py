"""The LM head on a CPU, forwards: log-probs and entropies, block of rows by block of rows.

A block is multiplied out to fp32 logits in a buffer, and one compiled pass takes log-probs and
entropies from it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from polymath_fast.kernels.cpu import head_sums, rows
from polymath_fast.kernels.cpu.operands import bits
from polymath_fast.kernels.cpu.products import TileProducts, products_for
from polymath_fast.kernels.cpu.threads import parallel, split
from polymath_fast.kernels.cpu.workspace import buffer

LOGITS_BYTES = 72 * 2**20
"""of fp32 logits at a time: enough rows to pay for reading the weight once a block"""
ROWS_ALONE = 512
"""at a time where logits are not held: they and the logits of one group of columns stay in the
second-level cache"""


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
        self.temperature = temperature
        self.scale = np.float32(1 / temperature)
        self.targets = np.ascontiguousarray(targets.numpy())
        self.vocab = weight.shape[0]
        self._bias = (hidden.new_empty(0) if bias is None else bias).float().contiguous().numpy()
        count = hidden.shape[0]
        self.found = torch.empty(4, count, dtype=torch.float64)
        self.block = rows_that_fit(LOGITS_BYTES, 4 * self.vocab, count)
        self._held: torch.Tensor | None = None  # logits (rows, V + padding) of a block

    @property
    def logprobs(self) -> torch.Tensor:
        """(N,) fp32, of the blocks that were visited."""
        return self.found[0].float()

    @property
    def entropy(self) -> torch.Tensor:
        """(N,) fp32, of the blocks that were visited."""
        return self.found[1].float()

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of every block, whose logits are held until the next."""
        for start in range(0, self.hidden.shape[0], self.block):
            stop = min(start + self.block, self.hidden.shape[0])
            self._held = self._logits(start, stop)
            yield start, stop

    def visit(self) -> None:
        """All rows; no logits are held, so that hardly any leave the cache."""
        if not isinstance(self.products, TileProducts):
            for _ in self.blocks():
                pass
            return
        far = [
            start + np.flatnonzero(self._statistics_by_sums(slice(start, start + ROWS_ALONE), None))
            for start in range(0, self.hidden.shape[0], ROWS_ALONE)
        ]
        index = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *far]))
        if len(index):
            some = (
                self.hidden[index],
                self.weight,
                self.bias,
                torch.from_numpy(self.targets)[index],
            )
            rest = Head(*some, self.temperature)
            rest.products = self.products
            for _ in rest.blocks():
                pass
            self.found[:, index] = rest.found

    def sound(self, start: int, stop: int) -> torch.Tensor:
        """(2, stop - start) which rows have a finite log-prob, and which a finite entropy; by
        others there are no slopes."""
        return self.found[:2, start:stop].isfinite()

    def slopes(
        self,
        start: int,
        index: torch.Tensor,
        by_logprob: torch.Tensor,
        by_entropy: torch.Tensor,
        first: int,
        out: torch.Tensor,
    ) -> None:
        """Gradients of the logits of rows start + index (M,) of the block that begins at `start`,
        into rows of `out` (..., V + padding) from `first` on.

        by_logprob, by_entropy (rows,): derivatives of the loss by the block's log-probs and
        entropies.
        """
        block = slice(start, start + len(by_logprob))
        parallel(
            rows.head_slopes,
            split(len(index)),
            self._held.numpy(),
            self.vocab,
            index.numpy(),
            self.targets[block],
            self.scale,
            self.found[:, block].numpy(),
            by_logprob.float().numpy(),
            by_entropy.float().numpy(),
            first,
            bits(out),
        )

    def _logits(self, start: int, stop: int) -> torch.Tensor:
        width = odd_lines(self.vocab, 4)
        out = buffer("logits", (self.block, width), torch.float32)[: stop - start]
        if isinstance(self.products, TileProducts):
            self._logits_with_statistics(slice(start, stop), out)
        else:
            self._logits_then_statistics(slice(start, stop), out)
        return out

    def _logits_then_statistics(self, block: slice, out: torch.Tensor) -> None:
        self.products.logits(self.hidden[block], out[:, : self.vocab])
        parallel(
            rows.head_statistics,
            split(len(out)),
            out.numpy(),
            self.vocab,
            self._bias,
            self.targets[block],
            self.scale,
            self.found[:, block].numpy(),
        )

    def _logits_with_statistics(self, block: slice, out: torch.Tensor) -> None:
        far = self._statistics_by_sums(block, out[:, : self.vocab])
        if far.any():
            found, targets = self.found[:, block].numpy(), self.targets[block]
            given = (out.numpy(), self.vocab, targets, self.scale, found, far)
            parallel(head_sums.far_statistics, split(len(far)), *given)

    def _statistics_by_sums(self, block: slice, out: torch.Tensor | None) -> np.ndarray:
        """(rows,) bool: those whose statistics cannot be had so; their logits are in `out`, if
        there is one."""
        hidden, targets = self.hidden[block], self.targets[block]
        shifts = self._target_logits(hidden, targets)
        sums, chosen = self.products.logits_and_sums(
            hidden, self._bias, targets, self.scale, shifts, out
        )
        far = np.empty(len(hidden), np.bool_)
        given = (self.scale, shifts, sums, chosen, self.found[:, block].numpy(), far)
        parallel(head_sums.shifted_statistics, split(len(hidden)), *given)
        return far

    def _target_logits(self, hidden: torch.Tensor, targets: np.ndarray) -> np.ndarray:
        """(rows,) fp32 and scaled, about as they will be in the product."""
        index = torch.from_numpy(targets)
        found = (hidden.float() * self.weight[index].float()).sum(1)
        if len(self._bias):
            found += torch.from_numpy(self._bias)[index]
        return found.mul_(float(self.scale)).numpy()


def rows_that_fit(budget: int, row_bytes: int, count: int) -> int:
    """Rows of a buffer: what the budget allows in whole tiles, at least a few tiles."""
    return min(max(budget // row_bytes // 8 * 8, 32), max(count, 1))


def odd_lines(columns: int, itemsize: int) -> int:
    """Columns of a padded row: an odd number of cache lines, so that rows spread over all sets."""
    lines = -(-(columns + columns % 2) * itemsize // 64) | 1
    return lines * 64 // itemsize
