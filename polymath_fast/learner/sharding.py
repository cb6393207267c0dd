"""Who of a run's processes keeps and updates what, and what they exchange at an update.

Either all keep everything, sum up whole gradients and make the same update; or each keeps the
optimizer's state of one part of the weights (ZeRO's first stage, arXiv 1910.02054): the sum of that
part's gradient reaches it, and the weights that it updated reach the others.
"""

from __future__ import annotations

from torch import Tensor

from polymath_fast.kernels import grad_norm
from polymath_fast.kernels.autograd import note_written
from polymath_fast.kernels.flat_adamw import PART
from polymath_fast.ranks import Ranks


class Replicated:
    """Each process keeps and updates all of `elements`."""

    def __init__(self, ranks: Ranks, elements: int) -> None:
        self.part = (0, elements)
        self._ranks = ranks

    def add_up(self, grad: Tensor) -> Tensor:
        """Turn the part of (elements,) `grad` into everybody's sum; returns the norm of the sum of
        the whole, 0-d fp64."""
        self._ranks.add(grad)
        return grad_norm(grad)

    def publish(self, live: Tensor) -> None:
        """Give the part of the (elements,) weights to the others, and take theirs; nothing where
        all have updated everything."""


class Sharded(Replicated):
    """Each process keeps and updates a part, `part`, which may be empty."""

    def __init__(self, ranks: Ranks, elements: int) -> None:
        self._ranks = ranks
        self._bounds = bounds(elements, ranks.size)
        self.part = (self._bounds[ranks.rank], self._bounds[ranks.rank + 1])

    def add_up(self, grad: Tensor) -> Tensor:
        self._ranks.add_parts(grad, self._bounds)
        return grad_norm(grad, part=self.part, add=self._ranks.add)

    def publish(self, live: Tensor) -> None:
        self._ranks.share_parts(live, self._bounds)
        note_written([live])


def bounds(elements: int, size: int) -> list[int]:
    """First elements of `size` even parts, and the end; multiples of `PART`, so that kernels find
    addresses as in the whole, and sums of squares are the whole's."""
    units = -(-elements // PART)
    return [min(elements, PART * (units * rank // size)) for rank in range(size + 1)]
