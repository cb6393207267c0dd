"""Optimizer state in a file, of which memory holds one chunk at a time.

The file has no name and is gone with the process, however that ends: a checkpoint is what a run is
resumed from. What the system has memory for it keeps in its page cache, from which it takes it when
somebody needs it.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from polymath_fast.errors import UserError

CHUNK = 1 << 22
"""elements in memory at once: 16 MiB a float32 tensor, a whole number of pages"""
_ZEROS = bytes(1 << 20)


class StateFile:
    """Flat tensors of zeros that are mapped from a file."""

    def __init__(
        self,
        folder: Path | None,
        kinds: Mapping[str, torch.dtype],
        elements: int,
        chunk: int = CHUNK,
    ):
        """(elements,) of each of `kinds`; `folder` None means the system's for such files.

        Raises:
            UserError: the folder's disk has no room.
        """
        self._elements, self._chunk = elements, chunk
        count = max(1, elements)  # there are no empty files in memory
        sizes = [_whole_pages(count * kind.itemsize) for kind in kinds.values()]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._map = _mapped(folder, sum(sizes))
        self._places = {
            name: (start, kind.itemsize)
            for (name, kind), start in zip(kinds.items(), starts, strict=True)
        }
        self.tensors: dict[str, Tensor] = {
            name: torch.frombuffer(self._map, dtype=kind, count=count, offset=start)[:elements]
            for (name, kind), start in zip(kinds.items(), starts, strict=True)
        }

    def sweep(self, visit: Callable[[int, int, dict[str, Tensor]], None]) -> None:
        """visit(start, stop, tensors of these elements) for all chunks in order; what it writes to
        them stays."""
        for start in range(0, self._elements, self._chunk):
            stop = min(start + self._chunk, self._elements)
            visit(start, stop, {name: t[start:stop] for name, t in self.tensors.items()})
            self._let_go(start, stop)

    def settle(self) -> None:
        """Hold nothing in memory."""
        self._let_go(0, self._elements)

    def _let_go(self, start: int, stop: int) -> None:
        """Of a page that belongs to other elements, too, nothing is lost: the file has it."""
        for first, itemsize in self._places.values():
            begin = (first + start * itemsize) // mmap.PAGESIZE * mmap.PAGESIZE
            length = _whole_pages(first + stop * itemsize) - begin
            if length:
                self._map.madvise(mmap.MADV_DONTNEED, begin, length)


def _mapped(folder: Path | None, size: int) -> mmap.mmap:
    where = folder or Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file.fileno(), size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"--offload-optimizer: no file in {where}: {error.strerror}") from error
        raise UserError(
            f"--offload-optimizer needs {size / 2**30:.1f} GiB on the disk of {where}, which has "
            "no room for them; choose another --output-dir, or leave it out"
        ) from error


def _reserve(descriptor: int, size: int) -> None:
    """Make room now: a disk that is full later would kill the process that writes to its map."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    while size > 0:
        size -= os.write(descriptor, _ZEROS[:size])


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
