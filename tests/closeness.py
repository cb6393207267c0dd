"""How far results are from the truth."""

from __future__ import annotations

from torch import Tensor


def relative_error(found: Tensor, truth: Tensor) -> float:
    """In the Frobenius norm, summed up in float64; NaN, which is below no limit, where the truth
    is 0."""
    found, truth = found.double(), truth.double()
    return float((found - truth).norm() / truth.norm())
