"""Times on a GPU: variants in turn, so that clocks and heat are the same for all.

`timing` chooses between this and its likes for a CPU.
"""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch


@dataclass
class Timing:
    """Of one variant; times in ms."""

    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    peak_mib: float | None = None
    """memory above what was there before the call"""
    error: str | None = None

    def row(self) -> dict[str, float | str]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def interleave(
    variants: dict[str, Callable[[], object]], *, repeats: int = 7, warmups: int = 2
) -> dict[str, Timing]:
    """Median time of each variant, all of them run in turn; one that fails says why.

    Caches are cold: a buffer larger than any L2 cache is written before each call.
    """
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    found = {name: Timing() for name in variants}
    for name, variant in variants.items():
        try:
            found[name].peak_mib = _peak(variant)
            for _ in range(warmups - 1):
                variant()
            torch.cuda.synchronize()
        # a variant that cannot run here is a result, too
        except Exception as error:
            found[name].error = f"{type(error).__name__}: {str(error)[:300]}"
            found[name].peak_mib = None
            traceback.print_exc()
            torch.cuda.empty_cache()
    samples: dict[str, list[float]] = {n: [] for n, timing in found.items() if not timing.error}
    for _ in range(repeats):
        for name, times in samples.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            variants[name]()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    for name, times in samples.items():
        found[name].median = statistics.median(times)
        ordered = sorted(times)
        found[name].p20 = ordered[len(ordered) // 5]
        found[name].p80 = ordered[-1 - len(ordered) // 5]
    return found


def _peak(variant: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = variant()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20
