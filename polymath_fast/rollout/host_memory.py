"""Memory of a CPU that another process can map: what `cuda_driver` is for a GPU."""

from __future__ import annotations

import mmap
import os

import torch
from torch import Tensor

from polymath_fast.errors import UserError

HANDLE_BYTES = 64


class HostMemory:
    """Anonymous files (memfd): they vanish with the last process that has them open.

    Events do nothing: a CPU has done its work when a call returns.
    """

    device_id = "host memory"

    def __init__(self) -> None:
        """Raises UserError where the system has no anonymous files (they are Linux's)."""
        if not hasattr(os, "memfd_create"):
            raise UserError("weights can be shared between processes on Linux only")
        self._mapped: dict[int, tuple[str, mmap.mmap]] = {}

    def allocate(self, size: int) -> int:
        """Address of `size` bytes of zeros."""
        descriptor = os.memfd_create("polymath_fast_weights")
        os.ftruncate(descriptor, size)
        return self._map(f"/proc/{os.getpid()}/fd/{descriptor}")

    def shareable(self, address: int) -> bool:
        """Whether `allocate` made it."""
        return any(base <= address < base + len(m) for base, (_, m) in self._mapped.items())

    def memory_handle(self, address: int) -> tuple[bytes, int]:
        """Where another process finds the memory, and how far into it `address` is."""
        base = self._base(address)
        return self._mapped[base][0].encode().ljust(HANDLE_BYTES), address - base

    def open_memory(self, handle: bytes) -> int:
        """Address in this process of another one's memory. Raises RuntimeError when it is gone."""
        try:
            return self._map(handle.decode().strip())
        except (OSError, UnicodeDecodeError) as error:
            raise RuntimeError(f"the shared memory cannot be opened: {error}") from error

    def close_memory(self, address: int) -> None:
        """Unmap it once no tensor of it is left."""
        self._mapped.pop(self._base(address))

    def new_event(self) -> int:
        return 0

    def event_handle(self, event: int) -> bytes:
        return bytes(HANDLE_BYTES)

    def open_event(self, handle: bytes) -> int:
        return 0

    def close_event(self, event: int) -> None: ...

    def record(self, event: int) -> None: ...

    def wait(self, event: int) -> None: ...

    def bytes_at(self, address: int, size: int) -> Tensor:
        """(size,) uint8 tensor of that memory."""
        base = self._base(address)
        memory = torch.frombuffer(self._mapped[base][1], dtype=torch.uint8)
        return memory[address - base :][:size]

    def _base(self, address: int) -> int:
        for base, (_, memory) in self._mapped.items():
            if base <= address < base + len(memory):
                return base
        raise RuntimeError(f"{address:#x} is not shared memory of this process")

    def _map(self, path: str) -> int:
        with open(path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        base = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        self._mapped[base] = (path, memory)
        return base
