"""What a step tells of the memory that its engine lent to the learner (`--reuse-kv-cache`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polymath_fast.kernels.scratch import Arena

_GIB = 2**30


def metrics(arena: Arena | None) -> dict[str, float]:
    """Bytes that lay in the KV cache at once, and those of the largest request that did not fit."""
    if arena is None:
        return {}
    return {
        "memory/kv_reused_gib": arena.most / _GIB,
        "memory/kv_refused_gib": arena.refused / _GIB,
    }


def note(arena: Arena | None, learned: Mapping[str, float]) -> str | None:
    """What to tell of a loan whose arena did not hold everything; None: nothing.

    Args:
        learned: what the learner reports of its update. Without one it asks for no memory.
    """
    if arena is None or learned["update/skipped"]:
        return None
    if arena.refused:
        return (
            "some of the learner's scratch memory did not fit in vLLM's KV cache and was allocated "
            "beside it (memory/kv_refused_gib); a larger --kv-cache-gib holds more"
        )
    if not arena.most:
        return (
            "--reuse-kv-cache had no effect: the operators that run here take no scratch memory "
            "that could lie in vLLM's KV cache"
        )
    return None
