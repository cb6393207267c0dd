"""The three matrix products around a language-model head, on whatever this processor does best.

`Products.logits` gives fp32 logits of a few rows; the other two turn their gradient into that of
`hidden` and `weight`, with fp32 sums.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

from polymath_fast.kernels.cpu import bf16, blocks, head_sums, tiles
from polymath_fast.kernels.cpu.operands import (
    bits,
    pack_rows,
    padded_rows,
    panel_count,
    scratch_words,
    words,
)
from polymath_fast.kernels.cpu.threads import parallel, split
from polymath_fast.kernels.cpu.weight_gradient import GROUP, weight_gradient
from polymath_fast.kernels.cpu.workspace import buffer

_precision_lock = threading.RLock()
_CHAIN = 256
"""hidden entries that one fp32 sum of torch's products runs over"""


class Products(Protocol):
    """R rows of a block, M rows that carry a gradient, H hidden, V vocabulary, A of its columns."""

    slope_dtype: torch.dtype
    """of the gradient with respect to the logits"""

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """out (R, V) fp32 = hidden (R, H) @ weight.T"""

    def d_hidden(
        self, slopes: torch.Tensor, count: int, columns: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        """out (M, H) fp32 = slopes @ weight[columns].

        slopes: rows in whole tiles, `count` = M of them meant; A columns, padded to an even number
        with zeros. columns: (A,) int64, None = all.
        """

    def d_weight(
        self, slopes: torch.Tensor, hidden: torch.Tensor, out: torch.Tensor, add: bool
    ) -> None:
        """out (A, H) fp32 = or += slopes (M, A + padding).T @ hidden (M, H)"""


def products_for(weight: torch.Tensor) -> Products:
    """The implementation for `weight` (V, H) on this machine."""
    if weight.dtype == torch.bfloat16 and tiles.available(weight.dtype):
        return TileProducts(weight)
    return TorchProducts(weight)


class TileLogits:
    """Logits of a bf16 or fp32 weight (V, H) in tiles: fp32 sums, in an order that is the same for
    every row, whatever other rows there are."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self._padding = weight.shape[1] % 2 if weight.dtype == torch.bfloat16 else 0
        self._panels: np.ndarray | None = None

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """See `Products.logits`."""
        left, panels = self._factors(hidden)
        parallel(bf16.logits, split(len(panels)), left, len(hidden), panels, out.numpy())

    def logits_and_sums(
        self,
        hidden: torch.Tensor,
        bias: np.ndarray,
        targets: np.ndarray,
        scale: np.float32,
        shifts: np.ndarray,
        out: torch.Tensor | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """`logits` with `bias`, unless nobody wants them, and for `head_sums.shifted_statistics`
        the sums (groups, R, 2) and the targets' logits (R,)."""
        left, panels = self._factors(hidden)
        groups = head_sums.group_count(len(panels))
        sums = buffer("softmax_sums", (groups, len(hidden), 2), torch.float32).numpy()
        chosen = np.empty(len(hidden), np.float32)
        held = np.empty((0, 0), np.float32) if out is None else out.numpy()
        given = (left, len(hidden), panels, len(self._weight), bias, targets, scale, shifts, held)
        parallel(head_sums.logits_and_sums, split(groups), *given, sums, chosen)
        return sums, chosen

    def _factors(self, hidden: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Rows and panels of the product."""
        if self._panels is None:
            self._panels = self._packed()
        count, size = hidden.shape
        shape = (padded_rows(count), size + self._padding)
        left = buffer("left_rows", shape, self._weight.dtype)
        left[:count, :size] = hidden
        left[:, size:] = 0
        return words(left), self._panels

    def _packed(self) -> np.ndarray:
        weight = self._weight
        padded = torch.nn.functional.pad(weight, (0, self._padding)) if self._padding else weight
        right = words(padded.contiguous())
        shape = (panel_count(len(weight)), right.shape[1], tiles.COLUMNS)
        panels = scratch_words("weight_panels", shape, right.dtype)
        parallel(bf16.pack_weight, split(len(panels)), right, panels)
        return panels


class TileProducts(TileLogits):
    """Our own bf16 products with fp32 sums, see `blocks`."""

    slope_dtype = torch.bfloat16

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight)
        self._pairs: np.ndarray | None = None

    def d_hidden(
        self, slopes: torch.Tensor, count: int, columns: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        if columns is not None:
            packed = pack_rows("some_weight_pairs", self._weight[columns])
        elif self._pairs is None:
            packed = self._pairs = pack_rows("weight_pairs", self._weight)
        else:
            packed = self._pairs
        tasks = split(count, 2 * blocks.PADDING, per_thread=4)
        pairs = words(slopes)[:, : packed.shape[1]]
        parallel(bf16.hidden_gradient, tasks, pairs, packed, out.numpy())

    def d_weight(
        self, slopes: torch.Tensor, hidden: torch.Tensor, out: torch.Tensor, add: bool
    ) -> None:
        add_weight_gradient(slopes, hidden, pack_rows("hidden_pairs", hidden), out, add)


class TorchProducts:
    """torch's products in fp32."""

    slope_dtype = torch.float32

    def __init__(self, weight: torch.Tensor) -> None:
        self._wide = weight
        if weight.dtype != torch.float32:
            self._wide = buffer("wide_weight", tuple(weight.shape), torch.float32)
            self._wide.copy_(weight)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        hidden = hidden.float()
        with _fp32_products():
            # short sums, added up: the rounding of a long fp32 sum shows in log-probs
            for first in range(0, hidden.shape[1], _CHAIN):
                some = slice(first, first + _CHAIN)
                product = (hidden[:, some], self._wide[:, some].t())
                torch.addmm(out, *product, out=out) if first else torch.mm(*product, out=out)

    def d_hidden(
        self, slopes: torch.Tensor, count: int, columns: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        weight = self._wide if columns is None else self._wide[columns]
        with _fp32_products():
            _add_product(slopes[:count, : len(weight)], weight, out, False)

    def d_weight(
        self, slopes: torch.Tensor, hidden: torch.Tensor, out: torch.Tensor, add: bool
    ) -> None:
        with _fp32_products():
            _add_product(slopes[:, : len(out)].t(), hidden.float(), out, add)


def packed_rows(hidden: torch.Tensor) -> np.ndarray | None:
    """`hidden` (N, H) as `add_weight_gradient` reads it, in scratch memory; None: as it is."""
    if hidden.dtype != torch.bfloat16 or not tiles.available(hidden.dtype):
        return None
    return pack_rows("hidden_pairs", hidden)


def add_weight_gradient(
    slopes: torch.Tensor,
    hidden: torch.Tensor,
    packed: np.ndarray | None,
    out: torch.Tensor,
    add: bool,
) -> None:
    """out (A, H) fp32 = or += slopes (N, A).T @ hidden (N, H), which `packed_rows` has packed."""
    if packed is not None:
        per_thread = -(-len(out) // (GROUP * torch.get_num_threads()))
        tasks = split(len(out), 2 * blocks.PADDING, per_thread)  # as many for each thread
        parallel(weight_gradient, tasks, bits(slopes), packed, out.numpy(), add)
        return
    _add_product(slopes.t(), hidden, out, add)


def _add_product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, add: bool) -> None:
    """out fp32 = or += left @ right."""
    if left.dtype == torch.float32:
        torch.addmm(out, left, right, out=out) if add else torch.mm(left, right, out=out)
        return
    # torch rounds a bf16 product to bf16; parts are added up in fp32 all the same
    partial = torch.mm(left, right)
    out.add_(partial) if add else out.copy_(partial)


@contextmanager
def _fp32_products() -> Iterator[None]:
    """oneDNN multiplies fp32 matrices as they are, whatever else it was told.

    Autocast, which would round the factors and the result, does not reach inside. The setting is
    the whole process's: one thread at a time has it changed.
    """
    settings = torch.backends.mkldnn.matmul
    with _precision_lock:
        before = settings.fp32_precision
        settings.fp32_precision = "ieee"
        try:
            with torch.autocast("cpu", enabled=False):
                yield
        finally:
            settings.fp32_precision = before


def _renew_lock() -> None:
    """A forked child has a lock of its own: its parent's may be held by a thread it lacks."""
    global _precision_lock
    _precision_lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)
