"""What a benchmark of one operator is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.timing import Variants


@dataclass
class Case:
    """One operator on one set of inputs."""

    shape: dict[str, int]
    variants: Variants
    """ours first; the first rival is what ratios are taken against"""
    baseline: str
    check: Callable[[], dict[str, float]]
    """errors of ours; raises AssertionError where one is too large"""
    flops: float = 0.0
    bytes: float = 0.0
    """what the best algorithm must do, for the share of the machine's rate"""
    other_bytes: dict[str, float] = field(default_factory=dict)
    """of variants that move another number of them"""

    def bytes_of(self, variant: str) -> float:
        """What this one must move."""
        return self.other_bytes.get(variant, self.bytes)


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """In the Frobenius norm, summed up in float64."""
    found, truth = found.double(), truth.double()
    return float((found - truth).norm() / truth.norm())
