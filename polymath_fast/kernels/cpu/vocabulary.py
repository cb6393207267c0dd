"""Which columns of the vocabulary carry a gradient worth multiplying out.

Rollouts of one prompt agree on most of what could never come next: at low temperature all but a few
percent of the columns hold next to nothing of the gradient. The others are gathered, so that the
two products stay dense, and what is left out is bounded:

    |error of d_hidden_i| <= sum over columns left out of |slope_iv| |weight_v|
    |error of d_weight_v| <= sum over rows of |slope_iv| |hidden_i|   for every column left out
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from polymath_fast.kernels.active_vocabulary import (
    CPU_BUDGETS,
    MARGIN,
    ROUNDING,
    SAMPLED_ROWS,
    SOME_COLUMNS,
)
from polymath_fast.kernels.cpu.jit import njit
from polymath_fast.kernels.cpu.operands import bits, padded_rows
from polymath_fast.kernels.cpu.products import Products
from polymath_fast.kernels.cpu.scalar import value
from polymath_fast.kernels.cpu.threads import parallel, split

_HEAVIEST = 256
"""columns on which "auto" looks up how long the weight's gradient is at least"""


@dataclass
class VocabReport:
    """What was left out, over all chunks."""

    rows: int = 0
    kept: float = 0.0
    mass: float = 0.0
    dropped: float = 0.0
    bound: float = 0.0

    def add(
        self, rows: int, share: float, columns: Columns | None = None, bound: float = 0.0
    ) -> None:
        """One chunk of `rows`, of which this `share` of the columns was multiplied out."""
        self.rows += rows
        self.kept += rows * share
        if columns is not None:
            self.mass += float(columns.mass.double().sum())
            self.dropped += float(columns.mass[columns.dropped].double().sum())
        self.bound = max(self.bound, bound)

    def metrics(self) -> dict[str, torch.Tensor]:
        """0-d: share of columns kept, share of the gradient's mass left out where any was, bound
        of the relative error of the gradients."""
        values = {
            "vocab/live_share": self.kept / self.rows if self.rows else 1.0,
            "vocab/dropped_mass": self.dropped / self.mass if self.mass else 0.0,
            "vocab/error_bound": self.bound,
        }
        return {name: torch.tensor(number, dtype=torch.float32) for name, number in values.items()}


@dataclass
class Columns:
    """A choice of columns for one chunk of gradient rows."""

    live: torch.Tensor  # (A,) int64, ascending
    dropped: torch.Tensor  # (V - A,) int64
    mass: torch.Tensor  # (V,) sum over rows of |slope| |hidden|


def choose(slopes: np.ndarray, hidden: torch.Tensor, vocab: int, least: float) -> Columns:
    """Keep the columns of `slopes` (M, V + padding) in which any slope reaches `least`."""
    peak, mass = _sums_of_columns(slopes, hidden, vocab)
    return _columns(peak >= least, mass)


def choose_by_error(
    slopes: torch.Tensor, hidden: torch.Tensor, lengths: torch.Tensor, products: Products
) -> Columns | None:
    """Keep as few columns of `slopes` (M, V + padding) as a relative error of `ROUNDING` allows.

    None where so many matter that all of them are cheaper.
    """
    raw, vocab = bits(slopes), len(lengths)
    _, mass = _sums_of_columns(raw, hidden, vocab)
    ordered, order = mass.double().sort()
    reached = ordered.cumsum(0) / ordered.sum()
    allowed = MARGIN * ROUNDING * _expected_norm(slopes, hidden.shape[1], lengths, products)
    heaviest = slopes[:, order[-_HEAVIEST:]].float()
    weight_allowed = MARGIN * ROUNDING * float((heaviest.T @ hidden.float()).double().norm())
    for budget in CPU_BUDGETS:
        keep = torch.ones(vocab, dtype=torch.bool)
        keep[order[reached <= budget]] = False
        if keep.sum() > SOME_COLUMNS * vocab:
            return None
        columns = _columns(keep, mass)
        if float(mass[columns.dropped].double().norm()) > weight_allowed:
            continue
        if float(_row_masses(raw, _of_dropped(columns, lengths)).norm()) <= allowed:
            return columns
    return None


def _expected_norm(
    slopes: torch.Tensor, size: int, lengths: torch.Tensor, products: Products
) -> float:
    """Norm of d_hidden, from its ratio to sum |slope| |weight| on a sample of rows."""
    count = min(SAMPLED_ROWS, len(slopes))
    rows = torch.arange(count) * len(slopes) // count
    sample = torch.nn.functional.pad(slopes[rows], (0, 0, 0, padded_rows(count) - count))
    exact = torch.empty(len(rows), size, dtype=torch.float32)
    products.d_hidden(sample, len(rows), None, exact)
    masses = _row_masses(bits(slopes), lengths)
    return float(exact.double().norm() / masses[rows].norm() * masses.norm())


def weight_lengths(weight: torch.Tensor) -> torch.Tensor:
    """(V,) fp32 norms of the rows of `weight` (V, H)."""
    if weight.dtype == torch.float16:  # of which compiled code has no numbers
        weight = weight.float()
    out = torch.empty(weight.shape[0], dtype=torch.float32)
    parallel(_norms, split(len(out)), bits(weight.contiguous()), out.numpy())
    return out


def _row_masses(slopes: np.ndarray, lengths: torch.Tensor) -> torch.Tensor:
    """(M,) fp64 sum over columns of |slope| length."""
    out = torch.empty(len(slopes), dtype=torch.float64)
    parallel(_row_sums, split(len(slopes)), slopes, lengths.numpy(), out.numpy())
    return out


def _of_dropped(columns: Columns, lengths: torch.Tensor) -> torch.Tensor:
    """`lengths` (V,), zero at the columns that are kept."""
    return lengths.index_fill(0, columns.live, 0)


def _sums_of_columns(
    slopes: np.ndarray, hidden: torch.Tensor, vocab: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(V,) largest |slope| and (V,) sum over rows of |slope| |hidden|."""
    norms = hidden.float().norm(dim=1)
    peak, mass = torch.empty(2, vocab, dtype=torch.float32)
    parallel(_column_sums, split(vocab, 64), slopes, norms.numpy(), peak.numpy(), mass.numpy())
    return peak, mass


def _columns(keep: torch.Tensor, mass: torch.Tensor) -> Columns:
    return Columns(keep.nonzero()[:, 0], (~keep).nonzero()[:, 0], mass)


def gather(slopes: np.ndarray, columns: torch.Tensor, out: np.ndarray) -> None:
    """out (M, A + padding) = slopes[:, columns], the padding zero."""
    parallel(_gather, split(len(slopes)), slopes, columns.numpy(), out)


def error_bound(
    slopes: np.ndarray,
    columns: Columns,
    lengths: torch.Tensor,
    d_hidden: torch.Tensor | None,
    d_weight: torch.Tensor | None,
) -> float:
    """Upper bound of the relative error, in the Frobenius norm, that leaving columns out makes.

    lengths: (V,) norms of the weight's rows.
    d_hidden, d_weight: what the live columns gave, fp32.
    """
    bounds = [0.0]
    if d_hidden is not None:
        masses = _row_masses(slopes, _of_dropped(columns, lengths))
        bounds.append(_relative(float(masses.norm()), d_hidden))
    if d_weight is not None:
        bounds.append(_relative(float(columns.mass[columns.dropped].double().norm()), d_weight))
    return max(bounds)


def _relative(error: float, found: torch.Tensor) -> float:
    """`error` against the exact gradient, whose norm is at least that of `found` less the error."""
    exact = float(found.double().norm()) - error
    return error / exact if exact > 0 else float(error > 0)


@njit(fastmath=True)
def _column_sums(start, stop, slopes, norms, peak, mass):
    """Of columns [start, stop): largest |slope|, and sum over rows of |slope| norm."""
    peak[start:stop] = 0
    mass[start:stop] = 0
    width = 256
    for left in range(start, stop, width):
        right = min(left + width, stop)
        some_peak = peak[left:right]
        some_mass = mass[left:right]
        for i in range(slopes.shape[0]):
            row = slopes[i, left:right]
            norm = norms[i]
            for v in range(right - left):
                size = abs(value(row[v]))
                some_peak[v] = max(some_peak[v], size)
                some_mass[v] += size * norm


@njit(fastmath=True)
def _row_sums(start, stop, slopes, lengths, out):
    """out[i] = sum over columns of |slopes[i, v]| lengths[v]."""
    for i in range(start, stop):
        row = slopes[i, : lengths.size]
        total = 0.0
        for first in range(0, lengths.size, 1024):
            partial = np.float32(0)
            some = row[first : first + 1024]
            part = lengths[first : first + 1024]
            for v in range(some.size):
                partial += abs(value(some[v])) * part[v]
            total += partial
        out[i] = total


@njit(fastmath=True)
def _norms(start, stop, matrix, out):
    """out[i] = length of row i."""
    for i in range(start, stop):
        row = matrix[i]
        total = np.float32(0)
        for v in range(row.size):
            x = value(row[v])
            total += x * x
        out[i] = np.sqrt(total)


@njit()
def _gather(start, stop, slopes, columns, out):
    for i in range(start, stop):
        row = slopes[i]
        target = out[i]
        for a in range(columns.size):
            target[a] = row[columns[a]]
        for a in range(columns.size, target.size):
            target[a] = 0
