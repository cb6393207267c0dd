"""torch's own OpenMP threads, lent to compiled kernels that are not torch's.

After an operation these threads spin for milliseconds, waiting for the next one. Workers of another
pool would first have to win the cores from them; a kernel on the same threads starts at once.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch

_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_OWNER = os.getpid()


def available() -> bool:
    """Whether torch's threads can be reached: with GNU's OpenMP, and not in a forked child, where
    its threads are gone."""
    return os.getpid() == _OWNER and _library() is not None


def on_every_thread(work: Callable[[int], None]) -> None:
    """work(threads) on torch.get_num_threads() threads at the same time; returns when all are done.

    `threads` is how many there are: OpenMP may be told to give fewer than it is asked for.

    Raises:
        Exception: the first one that `work` raised on any thread.
    """
    library = _library()
    raised: list[BaseException] = []

    def region(_: int | None) -> None:
        try:
            work(library.omp_get_num_threads())
        except BaseException as error:  # nothing may leave through OpenMP's own frames
            raised.append(error)

    library.GOMP_parallel(_Region(region), None, torch.get_num_threads(), 0)
    if raised:
        raise raised[0]


@cache
def _library() -> ctypes.CDLL | None:
    """The OpenMP that torch calls, if it is GNU's or has its way in: GOMP_parallel(function, data,
    threads, flags)."""
    if not torch.backends.openmp.is_available():
        return None
    with suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.GOMP_parallel.argtypes = [_Region, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        library.omp_get_num_threads.argtypes = []
        return library
    return None
