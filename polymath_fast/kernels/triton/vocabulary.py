"""Backward products over the vocabulary columns that matter, gathered so that they stay dense.

The chunk's slopes are a[i] exps[i, v], its targets apart. What leaving columns out does is bounded:

    |error of d_hidden_i| <= sum over columns left out of |slope_iv| |weight_v|
    |error of d_weight_v| <= sum over rows of |slope_iv| |hidden_i|   for every column left out

A target is never left out. The number of columns is fetched from the device once a chunk, and for
"auto" the bound a second time: if it is too large after all, the chunk is done exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polymath_fast.kernels.triton.gradient_kernels import (
    column_masses_kernel,
    row_masses_kernel,
)
from polymath_fast.kernels.triton.head import Chunk
from polymath_fast.kernels.triton.products import product

ROUNDING = 2.6e-3
"""relative error that rounding a gradient to bf16 makes anyway"""
_BUDGETS = (ROUNDING / 2, ROUNDING / 4, ROUNDING / 8)
"""shares of the gradient's mass that "auto" tries to leave out, greediest first"""
_SAMPLE = 64
"""rows on which "auto" looks up how long the gradient is"""
_MARGIN = 0.8
"""part of the allowed error that may be planned for, because that length is an estimate"""
_WORTH_IT = 0.5
"""with more columns than this alive, gathering them costs more than it saves"""


@dataclass(frozen=True)
class Columns:
    """A choice of columns for one chunk."""

    live: torch.Tensor  # (A,) int64, ascending
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
        zero = torch.zeros((), device=weight.device)
        self._mass, self._dropped, self._bound = zero.clone(), zero.clone(), zero.clone()
        self._rows, self._kept = 0, 0.0

    def choose(self, chunk: Chunk, a: torch.Tensor, largest: torch.Tensor) -> Columns | None:
        """Columns for slopes a[i] exps[i]; None where multiplying all of them is cheaper.

        largest: 0-d, the largest |d loss / d logprob| of the chunk, divided by the temperature.
        """
        norms = torch.linalg.vector_norm(chunk.hidden, dim=1, dtype=torch.float32)
        peak, mass = self._sums_of_columns(chunk, a, torch.where(a != 0, norms, 0))
        if self.tol == "auto":
            keep = self._keep_by_error(chunk, a, mass)
        else:
            keep = peak >= self.tol * largest
        if keep is None:
            self.count(len(a), 1.0)
            return None
        keep[chunk.targets.clamp(0, len(keep) - 1)] = True
        live = keep.nonzero()[:, 0]
        lengths = torch.where(keep, 0, self._lengths)
        masses = self._row_masses(chunk, a, lengths[:, None])
        dropped = torch.where(keep, 0, mass)
        position = keep.cumsum(0) - 1
        return Columns(
            live,
            chunk.exps.index_select(1, live),
            self.weight.index_select(0, live),
            position[chunk.targets.clamp(0, len(keep) - 1)],
            torch.linalg.vector_norm(masses),
            torch.linalg.vector_norm(dropped),
            mass.sum(),
            dropped.sum(),
        )

    def accept(
        self,
        columns: Columns,
        hidden_norm: torch.Tensor | None,
        weight_norm: torch.Tensor | None,
    ) -> bool:
        """Whether gradients of these norms, from `columns`, are near enough; takes note of them."""
        bound = torch.zeros_like(self._bound)
        if hidden_norm is not None:
            bound = torch.maximum(bound, _relative(columns.dropped_rows, hidden_norm))
        if weight_norm is not None:
            bound = torch.maximum(bound, _relative(columns.dropped_columns, weight_norm))
        rows = len(columns.exps)
        if self.tol == "auto" and not bool(bound <= ROUNDING):
            self.count(rows, 1.0)
            return False
        self._bound = torch.maximum(self._bound, bound)
        self._mass += columns.mass
        self._dropped += columns.dropped_mass
        self.count(rows, len(columns.live) / len(self.weight))
        return True

    def count(self, rows: int, share: float) -> None:
        """Rows of which this share of the columns was multiplied out."""
        self._rows += rows
        self._kept += rows * share

    def metrics(self) -> dict[str, torch.Tensor]:
        """0-d: share of columns kept, share of the gradient's mass left out where any was, bound
        of the relative error of the gradients."""
        share = self._kept / self._rows if self._rows else 1.0
        lost = torch.where(self._mass > 0, self._dropped / self._mass, 0)
        return {
            "vocab/live_share": torch.tensor(share, device=lost.device),
            "vocab/dropped_mass": lost,
            "vocab/error_bound": self._bound,
        }

    def _keep_by_error(
        self, chunk: Chunk, a: torch.Tensor, mass: torch.Tensor
    ) -> torch.Tensor | None:
        """(V,) bool: as few columns as a relative error of `ROUNDING` allows; None: too many."""
        ordered, order = mass.double().sort()
        reached = ordered.cumsum(0) / ordered.sum()
        keeps = []
        for budget in _BUDGETS:
            keep = torch.empty_like(reached, dtype=torch.bool)
            keep[order] = reached > budget
            keeps.append(keep)
        choices = torch.stack([torch.zeros_like(keeps[0]), *keeps], dim=1)
        masses = self._row_masses(chunk, a, torch.where(choices, 0, self._lengths[:, None]))
        rows = torch.linspace(0, len(a) - 1, min(_SAMPLE, len(a)), device=a.device).long()
        exact = torch.empty(len(rows), self.weight.shape[1], device=a.device)
        product(chunk.exps[rows], self.weight, exact)
        exact *= a[rows, None]
        expected = exact.norm() / masses[rows, 0].norm() * masses[:, 0].norm()
        fits = masses[:, 1:].norm(dim=0) <= _MARGIN * ROUNDING * expected
        few = choices[:, 1:].sum(0) <= _WORTH_IT * len(mass)
        for keep, good in zip(keeps, (fits & few).tolist(), strict=True):
            if good:
                return keep
        return None

    def _row_masses(self, chunk: Chunk, a: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(C, K) sums over columns of |slope| lengths (V, K)."""
        out = torch.empty(len(a), lengths.shape[1], device=a.device)
        row_masses_kernel[(lengths.shape[1], -(-len(a) // 8))](
            chunk.exps,
            a,
            lengths.T.contiguous(),
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
        peak, mass = torch.empty(2, vocab, device=a.device)
        column_masses_kernel[(-(-vocab // 128),)](
            chunk.exps,
            a,
            norms,
            peak,
            mass,
            chunk.exps.stride(0),
            vocab,
            len(a),
            ROWS=32,
            BLOCK=128,
            num_warps=4,
        )
        return peak, mass


def _relative(error: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """`error` against the exact gradient, whose norm is at least `found` less the error."""
    exact = found - error
    return torch.where(exact > 0, error / exact, (error > 0).to(error.dtype))
