"""The engine's process of test_ipc: copies every version out and reports what it got.

Usage: ipc_child.py SOCKET_FD cuda|FOLDER VERSIONS
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
from pathlib import Path

import torch
from torch import Tensor

from polymath_fast.kernels import SegmentTable, weight_sync
from polymath_fast.rollout.channel import Channel
from polymath_fast.rollout.ipc import WeightReceiver


class FileDriver:
    """Shares files instead of GPU memory: what both processes map is one memory, too.

    Events do nothing: a CPU has done its work when a call returns.
    """

    device_id = "a GPU"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mapped: dict[int, tuple[str, mmap.mmap]] = {}
        self.calls: list[str] = []

    def allocate(self, size: int) -> int:
        name = f"memory-{os.getpid()}-{len(self.mapped)}"
        (self.folder / name).write_bytes(bytes(size))
        return self._map(name)

    def shareable(self, address: int) -> bool:
        return True

    def memory_handle(self, address: int) -> tuple[bytes, int]:
        for base, (name, memory) in self.mapped.items():
            if base <= address < base + len(memory):
                return name.encode().ljust(64), address - base
        raise RuntimeError(f"{address:#x} was not allocated here")

    def open_memory(self, handle: bytes) -> int:
        return self._map(handle.decode().strip())

    def close_memory(self, address: int) -> None:
        self.calls.append("close")

    def new_event(self) -> int:
        return 1

    def event_handle(self, event: int) -> bytes:
        return bytes(64)

    def open_event(self, handle: bytes) -> int:
        return 2

    def close_event(self, event: int) -> None:
        self.calls.append(f"close {event}")

    def record(self, event: int) -> None:
        self.calls.append(f"record {event}")

    def wait(self, event: int) -> None:
        self.calls.append(f"wait {event}")

    def bytes_at(self, address: int, size: int) -> Tensor:
        for base, (_, memory) in self.mapped.items():
            if base <= address < base + len(memory):
                return torch.frombuffer(memory, dtype=torch.uint8)[address - base :][:size]
        raise RuntimeError(f"{address:#x} is not mapped")

    def _map(self, name: str) -> int:
        with (self.folder / name).open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        base = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        self.mapped[base] = (name, memory)
        return base


def main(fd: int, driver_name: str, versions: int) -> None:
    if driver_name == "cuda":
        from polymath_fast.rollout.cuda_driver import CudaDriver

        driver = CudaDriver()
    else:
        driver = FileDriver(Path(driver_name))
    channel = Channel(socket.socket(fileno=fd), timeout=60)
    receiver = WeightReceiver(channel, driver)
    names = list(receiver.tensors)
    targets = [torch.zeros_like(t, dtype=torch.bfloat16) for t in receiver.tensors.values()]
    table = SegmentTable(list(receiver.tensors.values()), targets)
    for _ in range(versions):
        version = receiver.wait()
        weight_sync(table)
        receiver.taken()
        sums = {n: t.double().sum().item() for n, t in zip(names, targets, strict=True)}
        channel.send("sums", version=version, sums=sums)
    receiver.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
