"""Several threads inside one compiled kernel: tasks by counter, and barriers.

A kernel that alternates between short parallel phases would spend its time waking threads. Here the
threads enter once and stay; each phase has a counter of its own that hands out tasks and one that
counts who is done, so nothing has to be reset in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from polymath_fast.kernels.cpu.jit import njit
from polymath_fast.kernels.cpu.threads import on_threads

_PATIENCE = 2000
"""looks at a counter before the core is offered to other threads"""


@intrinsic
def atomic_add(typing_context, address, value):
    """Add to the 64-bit integer at an address that threads share; returns what was there before."""
    signature = types.int64(types.uintp, types.int64)

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, args[1], "seq_cst")

    return signature, emit


@intrinsic
def offer_core(typing_context):
    """Let another thread that waits for this core run first (sched_yield of the C library)."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])

    return types.int32(), emit


def together(kernel: Callable[..., None], phases: int, *args: Any) -> None:
    """kernel(threads, counters, *args) on all threads of torch at the same time.

    counters: (phases, 16) int64, zero; a row is a cache line and more, so that phases do not share
    one. `kernel` must release the GIL.
    """
    threads = torch.get_num_threads()
    counters = np.zeros((phases, 16), np.int64)
    if threads == 1:
        kernel(1, counters, *args)
        return
    on_threads(lambda present: kernel(present, counters, *args), threads)


@njit(inline="always")
def next_task(counters, phase):
    """The next number of this phase that no other thread has: 0, 1, ..."""
    return atomic_add(counters.ctypes.data + phase * counters.strides[0], 1)


@njit()
def barrier(threads, counters, phase):
    """Return when all threads have come here in this phase; what they wrote is then visible."""
    place = counters.ctypes.data + phase * counters.strides[0] + 8
    atomic_add(place, 1)
    looks = 0
    while atomic_add(place, 0) < threads:
        looks += 1
        if looks > _PATIENCE:
            offer_core()
