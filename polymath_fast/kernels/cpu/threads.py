"""Runs compiled kernels on several cores: on torch's own threads, or on workers of a pool.

The pool is for where torch's threads cannot be reached, see `openmp`. Its workers sleep on a lock
between kernels: a second pool that spins on the same cores would fight with torch's.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

from polymath_fast.kernels.cpu import openmp

_TASKS_PER_THREAD = 8


def split(
    count: int, quantum: int = 1, per_thread: int = _TASKS_PER_THREAD
) -> list[tuple[int, int]]:
    """[0, count) in `per_thread` ranges a thread, each but the last a multiple of `quantum`."""
    units = -(-count // quantum)
    tasks = max(1, min(units, torch.get_num_threads() * per_thread))
    bounds = [min(count, units * task // tasks * quantum) for task in range(tasks + 1)]
    return [(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False) if stop > start]


def parallel(kernel: Callable[..., None], ranges: list[tuple[int, int]], *args: Any) -> None:
    """kernel(start, stop, *args) for every range, on torch.get_num_threads() threads.

    `kernel` must release the GIL and must write to places that depend on its range alone.
    """
    threads = min(torch.get_num_threads(), len(ranges))
    if threads <= 1:
        for start, stop in ranges:
            kernel(start, stop, *args)
        return
    pending = deque(ranges)

    def drain(_: int) -> None:
        while True:
            try:
                start, stop = pending.popleft()
            except IndexError:  # another thread took the last range
                return
            kernel(start, stop, *args)

    on_threads(drain, threads)


def on_threads(work: Callable[[int], None], threads: int) -> None:
    """work(how many they are) on at least one and about `threads` threads at the same time.

    Raises:
        Exception: what `work` raised, once all threads are done.
    """
    if openmp.available():
        openmp.on_every_thread(work)
        return
    pool = worker_pool(os.getpid(), threads - 1)
    helpers = [pool.submit(work, threads) for _ in range(threads - 1)]
    try:
        work(threads)
    finally:
        for helper in helpers:
            helper.result()


@cache
def worker_pool(pid: int, workers: int) -> ThreadPoolExecutor:
    """One pool a process and size; `pid` keeps a forked child from waiting on its parent's."""
    cores = _process_cores()
    return ThreadPoolExecutor(
        workers, thread_name_prefix="polymath-kernels", initializer=_bind, initargs=(cores,)
    )


def _process_cores() -> set[int]:
    """Cores that any thread of this process may use.

    A runtime that binds its threads one to a core binds the caller too; workers that inherited
    that would share one core.
    """
    cores: set[int] = set()
    for task in os.listdir("/proc/self/task") if hasattr(os, "sched_getaffinity") else ():
        try:
            cores |= os.sched_getaffinity(int(task))
        except ProcessLookupError:  # the thread ended after the listing
            continue
    return cores


def _bind(cores: set[int]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)
