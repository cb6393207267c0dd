"""Backward products over the vocabulary columns that matter, gathered so that they stay dense.

The chunk's slopes are a[i] exps[i, v], its targets apart. What leaving columns out does is bounded:

    |error of d_hidden_i| <= sum over columns left out of |slope_iv| |weight_v|
    |error of d_weight_v| <= sum over rows of |slope_iv| |hidden_i|   for every column left out

A target is never left out. Which columns, how many, and whether the bound held in the end is
decided on the device, where the kernels read it; nothing waits for the host. Inputs of fp32, whose
products cuBLAS makes, keep all columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polymath_fast.kernels.active_vocabulary import GPU_BUDGETS, MARGIN, ROUNDING, SAMPLED_ROWS
from polymath_fast.kernels.scratch import Scratch
from polymath_fast.kernels.triton.budget import room_for
from polymath_fast.kernels.triton.head import Chunk
from polymath_fast.kernels.triton.products import product
from polymath_fast.kernels.triton.tiles import LIVE_STEP
from polymath_fast.kernels.triton.vocabulary_kernels import (
    column_masses_kernel,
    row_masses_kernel,
    some_columns_kernel,
    some_rows_kernel,
)


@dataclass(frozen=True)
class Columns:
    """A choice of columns for one chunk; the first `width` of each tensor's A columns or rows."""

    width: torch.Tensor  # (1,) int32; 0: all columns have to be multiplied
    live: torch.Tensor  # (V,) int64, those chosen first, ascending
    exps: torch.Tensor  # (C, A) those columns of the chunk's
    weight: torch.Tensor  # (A, H)
    targets: torch.Tensor  # (C,) int64, where in `live` each row's target is
    dropped_rows: torch.Tensor  # 0-d, bound of the error of d_hidden
    dropped_columns: torch.Tensor  # 0-d, bound of the error of d_weight
    mass: torch.Tensor  # 0-d, sum of |slope| |hidden| over all columns
    dropped_mass: torch.Tensor  # 0-d, and over those left out


class Vocabulary:
    """Chooses columns, and keeps account of what was left out."""

    def __init__(self, weight: torch.Tensor, tol: float | str) -> None:
        self.weight, self.tol = weight, tol
        self._lengths = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        self.room = room_for(len(weight), weight.dtype)
        """columns there can be in a choice; 0: there is none"""
        self._account = torch.zeros(5, device=weight.device, dtype=torch.float32)
        self._scratch = Scratch(weight.device)

    def choose(self, chunk: Chunk, a: torch.Tensor, largest: torch.Tensor) -> Columns:
        """Columns for slopes a[i] exps[i].

        largest: 0-d, the largest |d loss / d logprob| of the chunk, divided by the temperature.
        """
        norms = torch.linalg.vector_norm(chunk.hidden, dim=1, dtype=torch.float32)
        peak, mass = self._sums_of_columns(chunk, a, torch.where(a != 0, norms, 0))
        if self.tol == "auto":
            keep = self._keep_by_error(chunk, a, mass)
        else:
            keep = peak >= self.tol * largest
        vocab = len(keep)
        targets = chunk.targets.clamp(0, vocab - 1)
        live_row = torch.arange(len(a), device=a.device) < chunk.live
        # rows without a gradient mark a place past the end
        marked = torch.where(live_row, targets, vocab)
        ones = torch.ones_like(live_row)
        keep = torch.nn.functional.pad(keep, (0, 1)).index_copy(0, marked, ones)[:vocab]
        count = keep.sum()
        width = torch.where(count <= self.room, count, 0).to(torch.int32)[None]
        order = keep.logical_not().to(torch.uint8).sort(stable=True).indices
        masses = self._row_masses(chunk, a, torch.where(keep, 0, self._lengths)[:, None])
        dropped = torch.where(keep, 0, mass)
        exps, weight = self._gather(chunk, order, width)
        return Columns(
            width,
            order,
            exps,
            weight,
            (keep.cumsum(0) - 1)[targets],
            torch.linalg.vector_norm(masses),
            torch.linalg.vector_norm(dropped),
            mass.sum(),
            dropped.sum(),
        )

    def accept(
        self,
        columns: Columns,
        live: torch.Tensor,
        hidden_norm: torch.Tensor | None,
        weight_norm: torch.Tensor | None,
    ) -> torch.Tensor:
        """0-d bool: whether gradients of these norms, from `columns`, are near enough.

        live: (1,) int32, rows of the chunk. Takes note of what is accepted.
        """
        bound = torch.zeros_like(columns.mass)
        if hidden_norm is not None:
            bound = torch.maximum(bound, _relative(columns.dropped_rows, hidden_norm))
        if weight_norm is not None:
            bound = torch.maximum(bound, _relative(columns.dropped_columns, weight_norm))
        good = columns.width[0] > 0
        if self.tol == "auto":
            good = good & (bound <= ROUNDING)
        rows = live[0].float()
        share = torch.where(good, columns.width[0] / len(self.weight), 1.0)
        noted = torch.stack([columns.mass, columns.dropped_mass, bound])
        mass, dropped, bound = torch.where(good, noted, 0).unbind()
        sums = self._account + torch.stack([rows, rows * share, mass, dropped, bound])
        self._account = torch.where(
            torch.arange(5, device=sums.device) == 4, self._account.maximum(bound), sums
        )
        return good

    def metrics(self) -> dict[str, torch.Tensor]:
        """0-d: share of columns kept, share of the gradient's mass left out where any was, bound
        of the relative error of the gradients."""
        rows, kept, mass, dropped, bound = self._account.unbind()
        return {
            "vocab/live_share": torch.where(rows > 0, kept / rows, 1.0),
            "vocab/dropped_mass": torch.where(mass > 0, dropped / mass, 0.0),
            "vocab/error_bound": bound.clone(),
        }

    def buffer(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Scratch memory that lives until the next chunk asks for it."""
        return self._scratch.buffer(name, shape[0] * shape[1], dtype).view(shape)

    def release(self) -> None:
        """Give the scratch memory back."""
        self._scratch.release()

    def _gather(
        self, chunk: Chunk, order: torch.Tensor, width: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The chosen columns of `exps` (C, A) and rows of the weight (A, H)."""
        depth = self.weight.shape[1]
        exps = self.buffer("exps", (len(chunk.index), self.room), chunk.exps.dtype)
        weight = self.buffer("weight", (self.room, depth), self.weight.dtype)
        some_columns_kernel[(len(chunk.index),)](
            chunk.exps,
            order,
            chunk.live,
            width,
            exps,
            chunk.exps.stride(0),
            self.room,
            BLOCK=512,
            STEP=LIVE_STEP,
            num_warps=4,
        )
        some_rows_kernel[(self.room,)](
            self.weight,
            order,
            width,
            weight,
            self.weight.stride(0),
            depth,
            BLOCK=1024,
            STEP=LIVE_STEP,
            num_warps=4,
        )
        return exps, weight

    def _keep_by_error(self, chunk: Chunk, a: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        """(V,) bool: as few columns as a relative error of `ROUNDING` allows; all: too many."""
        ordered, order = mass.double().sort()
        reached = ordered.cumsum(0) / ordered.sum()
        keeps = torch.zeros(len(mass), len(GPU_BUDGETS), dtype=torch.bool, device=mass.device)
        for number, budget in enumerate(GPU_BUDGETS):
            keeps[:, number] = torch.empty_like(keeps[:, 0]).index_copy(0, order, reached > budget)
        choices = torch.nn.functional.pad(keeps, (1, 0))
        masses = self._row_masses(chunk, a, torch.where(choices, 0, self._lengths[:, None]))
        count = min(SAMPLED_ROWS, len(a))
        rows = torch.arange(count, device=a.device) * chunk.live.long() // count
        exact = torch.empty(count, self.weight.shape[1], device=a.device, dtype=torch.float32)
        product(chunk.exps[rows], self.weight, exact)
        exact *= a[rows, None]
        expected = exact.norm() / masses[rows, 0].norm() * masses[:, 0].norm()
        fits = masses[:, 1:].norm(dim=0) <= MARGIN * ROUNDING * expected
        good = fits & (keeps.sum(0) <= self.room)
        first = good & (good.cumsum(0) == 1)
        return (keeps & first).any(1) | ~good.any()

    def _row_masses(self, chunk: Chunk, a: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(C, K) sums over columns of |slope| lengths (V, K)."""
        out = torch.empty(len(a), lengths.shape[1], device=a.device, dtype=torch.float32)
        row_masses_kernel[(-(-len(a) // 8), lengths.shape[1])](
            chunk.exps,
            a,
            lengths.T.contiguous(),
            chunk.live,
            out,
            chunk.exps.stride(0),
            len(self.weight),
            len(a),
            ROWS=8,
            BLOCK=256,
            num_warps=4,
        )
        return out

    def _sums_of_columns(
        self, chunk: Chunk, a: torch.Tensor, norms: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(V,) largest |slope| and (V,) sum over rows of |slope| |hidden|."""
        vocab = len(self.weight)
        peak, mass = torch.empty(2, vocab, device=a.device, dtype=torch.float32)
        column_masses_kernel[(-(-vocab // 128),)](
            chunk.exps,
            a,
            norms,
            chunk.live,
            peak,
            mass,
            chunk.exps.stride(0),
            vocab,
            ROWS=32,
            BLOCK=128,
            num_warps=4,
        )
        return peak, mass


def _relative(error: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """`error` against the exact gradient, whose norm is at least `found` less the error."""
    exact = found - error
    return torch.where(exact > 0, error / exact, (error > 0).to(error.dtype))
