"""Scratch memory that is allocated once and used again.

Fresh pages cost a CPU more than the arithmetic on them: the kernel zeroes each one at first touch.
While an arena is lent to this thread, what fits lies there instead.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from polymath_fast.kernels.scratch import lent

_buffers = threading.local()
_claims = threading.local()
_CPU = torch.device("cpu")


def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor of this thread; the next request for `name` hands out its memory."""
    count = 1
    for size in shape:
        count *= size
    arena = lent(_CPU)
    held = None if arena is None else arena.named(name, count, dtype)
    if held is not None:
        return held.view(shape)
    store = _buffers.__dict__
    held = store.get(name)
    if held is None or held.dtype != dtype or held.numel() < count:
        store.pop(name, None)
        del held
        with torch.inference_mode(False):  # the sampler may ask first, the learner writes later
            held = store[name] = torch.empty(count, dtype=dtype)
    return held[:count].view(shape)


def claim(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """As `buffer`, for what outlives the call that fills it: as long as somebody holds the tensor,
    the next request gets other memory."""
    holders = _claims.__dict__
    holder = holders.get(name)
    if holder is not None and holder() is not None:
        return torch.empty(shape, dtype=dtype)
    tensor = buffer(name, shape, dtype)
    holders[name] = weakref.ref(tensor)
    return tensor


@contextmanager
def passing() -> Iterator[None]:
    """Buffers of this thread that come into being inside are given back at the end."""
    before = set(_buffers.__dict__)
    try:
        yield
    finally:
        for name in _buffers.__dict__.keys() - before:
            del _buffers.__dict__[name]


def trim() -> None:
    """Give memory that was freed, but that the C library keeps, back to the system."""
    with suppress(OSError, AttributeError, TypeError):  # only glibc can be asked
        ctypes.CDLL(None).malloc_trim(0)


def give_back(tensor: torch.Tensor) -> None:
    """Let the system have the pages of a CPU tensor that nobody reads before it is written again.

    What it holds then is undefined. Does nothing where the system cannot be asked.
    """
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    length = tensor.data_ptr() + tensor.nbytes - start
    if length < page or not hasattr(mmap, "MADV_DONTNEED"):
        return
    with suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(start), ctypes.c_size_t(length // page * page), mmap.MADV_DONTNEED)


def clear() -> None:
    """Give this thread's scratch memory back."""
    _buffers.__dict__.clear()
