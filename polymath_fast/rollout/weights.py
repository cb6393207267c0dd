"""How updated weights reach the sampler. One strategy object per engine, one word per strategy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor


class WeightSync(Protocol):
    """Brings the learner's weights to the engine and remembers which version it holds."""

    name: str
    version: int
    """optimizer updates the engine's weights have seen; stamped on every completion"""

    def push(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Make the engine sample from `named_weights` (Hugging Face names) from now on."""


class IdentitySync:
    """Engine and learner use one module: the optimizer's store has already been the sync."""

    name = "identity"

    def __init__(self) -> None:
        self.version = 0

    def push(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Only the version moves."""
        self.version = version
