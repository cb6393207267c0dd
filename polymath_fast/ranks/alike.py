"""Whether the processes of a run still hold the same weights (`--verify-sync`)."""

from __future__ import annotations

from torch import Tensor

from polymath_fast.errors import EngineError
from polymath_fast.ranks.ranks import Ranks
from polymath_fast.rollout.weights import checksums


def verify_alike(ranks: Ranks, weights: Tensor) -> None:
    """Raise EngineError unless `weights` are the same for all, by checksum; all have to call it."""
    sums = ranks.gather(checksums([weights]))
    odd = [rank for rank, found in enumerate(sums) if found != sums[0]]
    if odd:
        raise EngineError(f"the weights of process {odd[0]} are not those of process 0")
