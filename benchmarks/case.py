"""What a benchmark of one operator is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.timing import Variants
from polymath_fast.kernels.active_vocabulary import ROUNDING

CHECKED_ROWS = 256
LOGPROB_ERROR = 1e-5


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


def require(name: str, error: float, limit: float) -> None:
    """Raises AssertionError: a variant that is wrong is not timed."""
    assert error <= limit, f"{name}: error {error:.2e} is above {limit:.1e}; nothing was timed"


def checked(errors: dict[str, float]) -> dict[str, float]:
    """The errors, which must be those of log-probs or, named d_..., of gradients."""
    for name, error in errors.items():
        require(name, error, ROUNDING if name.startswith("d_") else LOGPROB_ERROR)
    return errors


def logprob_error(logits: torch.Tensor, targets: torch.Tensor, found: torch.Tensor) -> float:
    """The largest one of log-probs (N,) that were found, against those of exact logits (N, V)."""
    truth = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return float((found - truth).abs().max())
