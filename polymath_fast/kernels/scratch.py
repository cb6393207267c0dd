"""Memory that dies with the call that asked for it, taken from somebody else's where some is lent.

An `Arena` is memory whose owner does not need it for a while, such as the KV cache of an engine
that is not sampling. While it is lent, operators take their scratch memory from it as far as it
fits. Where an operator's bytes lie changes no result.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

ALIGNED = 512
"""bytes; what torch's own allocations on a GPU are aligned to, those on a CPU are to 64"""

_here = threading.local()


class Arena:
    """Parts of storages that are somebody else's; closing it leaves zeros where any was handed out.

    Zeros, because the owner may read what it never wrote: attention multiplies what lies behind the
    end of a sequence by 0, which makes 0 of a number and NaN of a NaN.

    Args:
        storages: on one device. Those that several tensors share count once.
    """

    def __init__(self, storages: Iterable[torch.UntypedStorage]) -> None:
        distinct = {each.data_ptr(): each for each in storages if each.nbytes()}
        self._storages = list(distinct.values())
        self.device = self._storages[0].device if self._storages else None
        self.capacity = sum(each.nbytes() for each in self._storages)
        self._taken: list[dict[int, int]] = [{} for _ in self._storages]  # start -> stop, in bytes
        self._reach = [0] * len(self._storages)  # nothing was handed out from there on
        self._named: dict[str, torch.Tensor] = {}
        self.most = 0
        """bytes that were in use at once, at most"""
        self.refused = 0
        """bytes of the largest request that did not fit"""

    @property
    def in_use(self) -> int:
        """Bytes that are handed out now."""
        return sum(stop - start for taken in self._taken for start, stop in taken.items())

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor | None:
        """An uninitialised tensor (count,), until `give_back`; None where no storage has room."""
        if count == 0:
            return None
        size = count * dtype.itemsize
        for number, storage in enumerate(self._storages):
            start = self._gap(number, size)
            if start is None:
                continue
            self._taken[number][start] = start + size
            self._reach[number] = max(self._reach[number], start + size)
            self.most = max(self.most, self.in_use)
            return _view(storage, start, count, dtype)
        self.refused = max(self.refused, size)
        return None

    def give_back(self, tensor: torch.Tensor) -> None:
        """Of `take`; what was taken from another arena, or before this one was closed, is not
        there any more."""
        for storage, taken in zip(self._storages, self._taken, strict=True):
            if storage.data_ptr() == tensor.untyped_storage().data_ptr():
                taken.pop(tensor.data_ptr() - storage.data_ptr(), None)

    def named(self, name: str, count: int, dtype: torch.dtype) -> torch.Tensor | None:
        """As `take`, but the next request for `name` hands out the same memory."""
        held = self._named.get(name)
        if held is None or held.dtype != dtype or held.numel() < count:
            if held is not None:
                self.give_back(self._named.pop(name))
            held = self.take(count, dtype)
            if held is None:
                return None
            self._named[name] = held
        return held[:count]

    def close(self) -> None:
        """Take everything back, leave zeros, hold no storage any longer."""
        for storage, reach in zip(self._storages, self._reach, strict=True):
            if reach:
                _view(storage, 0, reach, torch.uint8).zero_()
        self._storages, self._taken, self._reach = [], [], []
        self._named.clear()

    def _gap(self, number: int, size: int) -> int | None:
        """Where `size` bytes are free in a storage, aligned in memory; the first such place."""
        base, end = self._storages[number].data_ptr(), self._storages[number].nbytes()
        free = -base % ALIGNED
        for start, stop in sorted(self._taken[number].items()):
            if free + size <= start:
                return free
            free = stop + -(base + stop) % ALIGNED
        return free if free + size <= end else None


class Scratch:
    """Buffers of one call on one device, from the arena that is lent here, or else allocated."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arena = lent(device)
        self._buffers: dict[str, torch.Tensor] = {}

    def buffer(self, name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor (count,); the next request for `name` hands out its memory."""
        held = self._buffers.get(name)
        if held is None or held.dtype != dtype or held.numel() < count:
            self._drop(name)
            del held
            taken = None if self._arena is None else self._arena.take(count, dtype)
            if taken is None:
                taken = torch.empty(count, dtype=dtype, device=self._device)
            held = self._buffers[name] = taken
        return held[:count]

    def release(self) -> None:
        """Give all of it back."""
        for name in list(self._buffers):
            self._drop(name)

    def _drop(self, name: str) -> None:
        held = self._buffers.pop(name, None)
        if held is not None and self._arena is not None:
            self._arena.give_back(held)


@contextmanager
def lend(arena: Arena) -> Iterator[Arena]:
    """Let the operators that this thread calls take their scratch memory from `arena`, and close it
    in the end. Raises ValueError if this thread is lent another one."""
    if getattr(_here, "arena", None) is not None:
        raise ValueError("this thread is lent an arena already; end that loan first")
    _here.arena = arena
    try:
        yield arena
    finally:
        _here.arena = None
        arena.close()


def lent(device: torch.device) -> Arena | None:
    """What this thread has been lent on `device`."""
    arena = getattr(_here, "arena", None)
    return arena if arena is not None and arena.device == device else None


def _view(
    storage: torch.UntypedStorage, start: int, count: int, dtype: torch.dtype
) -> torch.Tensor:
    """(count,) of the bytes from `start` on. A tensor of its own: views of one tensor would share
    the version that autograd compares, and be inference tensors where that one is."""
    assert start % dtype.itemsize == 0, "allocators align to 16 bytes at least"
    with torch.inference_mode(False):
        whole = torch.empty(0, dtype=dtype, device=storage.device)
        return whole.set_(storage, start // dtype.itemsize, (count,))
