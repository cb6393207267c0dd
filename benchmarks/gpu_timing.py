"""Times on a GPU: variants in turn, so that clocks and heat are the same for all.

`timing` chooses between this and its likes for a CPU.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import gpu_sizes

deadline = math.inf
"""by time.monotonic(): no variant begins later and no round is repeated, so that a section which
compiles for too long still hands out what it has"""

HEAD_START = 4_000_000
"""cycles, about 2 ms, for which the GPU is kept busy before a call, so that its kernels are all
launched before the first one begins and the host's part of their launches does not count"""

GRACE = 10.0
"""seconds that a variant which begins before `deadline` may take beyond it"""


def keep(found: dict[str, Any]) -> None:
    """Take what a section of several tables has so far, for one whose rival compiles for too long
    or hangs is ended; `gpu_suite` puts its own function here."""


@dataclass
class Timing:
    """Of one variant; times in ms."""

    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    peak_mib: float | None = None
    """memory above what was there before the call"""
    error: str | None = None

    def take(self, times: list[float]) -> None:
        ordered = sorted(times)
        self.median = statistics.median(times)
        self.p20 = ordered[len(ordered) // 5]
        self.p80 = ordered[-1 - len(ordered) // 5]

    def row(self) -> dict[str, float | str]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def interleave(
    variants: dict[str, Callable[[], object]],
    *,
    repeats: int = 7,
    launches: bool = False,
) -> dict[str, Timing]:
    """Median time of each variant, all of them run in turn; one that fails says why.

    Caches are cold: a buffer larger than any L2 cache is written before each call. Only with
    `launches` does the host's time to launch count.
    """
    sizes = gpu_sizes.SIZES
    flush = torch.empty(sizes.flush, dtype=torch.int8, device="cuda")
    ahead = 0 if launches else HEAD_START
    found = {name: Timing() for name in variants}
    for name, variant in variants.items():
        _guarded(found[name], lambda timing, v=variant: _warm_up(timing, v, sizes.warmups))
    samples: dict[str, list[float]] = {n: [] for n, timing in found.items() if not timing.error}
    for done in range(sizes.repeats or repeats):
        if done and time.monotonic() > deadline:
            break
        for name, times in samples.items():
            if not found[name].error:
                _guarded(
                    found[name],
                    lambda _, n=name, t=times: t.append(_once(variants[n], flush, ahead)),
                )
    for name, times in samples.items():
        if not found[name].error:
            found[name].take(times)
    return found


def once(make: Callable[[], Callable[[], object]]) -> Timing:
    """Of a single call of the variant that `make` returns, warmed up: for work of seconds.

    Its memory is all that there was not before `make`; what that leaves behind is given back.
    """

    def work(timing: Timing) -> None:
        if time.monotonic() > deadline:
            raise TimeoutError("not begun: the section's time was up")
        before = torch.cuda.memory_allocated()
        variant = make()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        variant()
        end.record()
        end.synchronize()
        timing.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        timing.median = timing.p20 = timing.p80 = start.elapsed_time(end)

    found = Timing()
    _guarded(found, work)
    # models and their hooks refer to each other
    gc.collect()
    torch.cuda.empty_cache()
    return found


def _guarded(timing: Timing, work: Callable[[Timing], None]) -> None:
    """`work(timing)`; what goes wrong becomes the variant's error, and its memory is given back."""
    try:
        work(timing)
        return
    # a variant that cannot run here is a result, too
    except Exception as error:
        timing.error = f"{type(error).__name__}: {str(error)[:300]}"
        timing.peak_mib = None
        traceback.print_exc()
    # only now: the error's frames held the variant's tensors
    gc.collect()
    torch.cuda.empty_cache()


def _warm_up(timing: Timing, variant: Callable[[], object], warmups: int) -> None:
    """Compile in the first calls; measure memory in the last, where no tuning takes any."""
    if time.monotonic() > deadline:
        raise TimeoutError("not begun: the section's time was up")
    for _ in range(warmups - 1):
        variant()
    timing.peak_mib = _peak(variant)


def _once(variant: Callable[[], object], flush: torch.Tensor, ahead: int) -> float:
    flush.zero_()
    if ahead:
        torch.cuda._sleep(ahead)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    variant()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _peak(variant: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = variant()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20
