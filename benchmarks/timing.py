"""Times and peak memory of variants that are run in turn, on a CPU or a GPU.

Machines are shared and their clocks drift, so variants are never timed one after the other: each
round runs all of them once, and what counts is their ratio.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_sizes
from benchmarks.gpu_timing import Timing
from benchmarks.gpu_timing import interleave as interleave_on_gpu
from polymath_fast.kernels.cpu import workspace
from polymath_fast.precision import default_dtype

Variants = dict[str, Callable[[], object]]


def interleave(variants: Variants, device: str, repeats: int) -> dict[str, Timing]:
    """Median, p20 and p80 (ms) and peak memory (MiB) of each variant."""
    if device == "cuda":
        return interleave_on_gpu(variants, repeats=repeats)
    found = {name: _warm_up(variant) for name, variant in variants.items()}
    samples: dict[str, list[float]] = {n: [] for n, timing in found.items() if not timing.error}
    for _ in range(repeats):
        for name, times in samples.items():
            start = time.perf_counter()
            variants[name]()
            times.append(1e3 * (time.perf_counter() - start))
    for name, times in samples.items():
        found[name].take(times)
    return found


def gemm_rate(device: str) -> float:
    """FLOP/s of torch's product in the dtype that weights have there (`precision`), on the shape of
    a small LM head or, on a GPU, a square."""
    rows, size, vocab = 3 * (gpu_sizes.SIZES.side,) if device == "cuda" else (1024, 576, 49152)
    dtype = default_dtype(device)
    left, right = (torch.randn(n, size, device=device).to(dtype) for n in (rows, vocab))
    out = torch.empty(rows, vocab, dtype=dtype, device=device)
    product = {"product": lambda: torch.mm(left, right.t(), out=out)}
    return 2 * rows * size * vocab / (1e-3 * interleave(product, device, 9)["product"].p20)


def copy_rate(device: str) -> float:
    """Bytes read and written a second by a copy that no cache holds."""
    count = gpu_sizes.SIZES.copied if device == "cuda" else 2**28
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copy = {"copy": lambda: target.copy_(source)}
    return 2 * source.numel() / (1e-3 * interleave(copy, device, 9)["copy"].p20)


def late(make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """What `make` returns, made at the first call.

    A rival whose import or set-up fails here is then one variant's error, not the whole table's.
    """
    made = functools.cache(make)
    return lambda *given: made()(*given)


def _warm_up(variant: Callable[[], object]) -> Timing:
    """Compile on the first run, measure memory on the second, with all scratch memory fresh."""
    try:
        variant()
        workspace.clear()
        with peak_memory() as peak:
            variant()
        return Timing(peak_mib=peak[0])
    # a rival that cannot run here is a result, too
    except Exception as error:
        return Timing(error=f"{type(error).__name__}: {str(error)[:200]}")


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """MiB of this process's memory at its highest inside, above what it had at the start."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    peak = [0.0]
    yield peak
    peak[0] = _status("VmHWM") - before


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)
