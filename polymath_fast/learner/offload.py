"""Optimizer state in the host's memory, sent through the GPU in chunks at each update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 22
"""elements on the device at once, twice: 16 MiB a float32 tensor hides the start of a copy"""
_SLOTS = 2


class Offloaded:
    """Tensors of the host that pass through the device, chunk by chunk.

    While a chunk is worked on, the next one arrives and the one before leaves, each way on a
    stream of its own; the caller's stream does the work. Nothing here waits on the host.
    """

    def __init__(self, tensors: dict[str, Tensor], device: torch.device, chunk: int = CHUNK):
        """`tensors` are (n,), on the CPU, pinned where copies are not to wait."""
        self._host = tensors
        self._elements = len(next(iter(tensors.values())))
        self._chunk = chunk
        self._module = torch.get_device_module(device)
        self._arriving, self._leaving = (self._module.Stream(device) for _ in range(2))
        room = min(chunk, self._elements)
        self._slots = [
            {name: torch.empty(room, dtype=t.dtype, device=device) for name, t in tensors.items()}
            for _ in range(_SLOTS)
        ]

    def sweep(self, visit: Callable[[int, int, dict[str, Tensor]], None]) -> None:
        """visit(start, stop, tensors of these elements on the device) for all chunks in order.

        What `visit` writes to the tensors comes back to the host.
        """
        work = self._module.current_stream()
        self._arriving.wait_stream(self._leaving)
        self._arriving.wait_stream(work)
        left: list[Any] = []
        starts = range(0, self._elements, self._chunk)
        arrived = self._fetch(starts[0], 0) if starts else None
        for index, start in enumerate(starts):
            stop = min(start + self._chunk, self._elements)
            here = {n: t[: stop - start] for n, t in self._slots[index % _SLOTS].items()}
            work.wait_event(arrived)
            if index + 1 < len(starts):
                if len(left) + 1 >= _SLOTS:
                    self._arriving.wait_event(left[index + 1 - _SLOTS])
                arrived = self._fetch(starts[index + 1], index + 1)
            visit(start, stop, here)
            self._leaving.wait_event(self._mark(work))
            with self._module.stream(self._leaving):
                for name, tensor in here.items():
                    self._host[name][start:stop].copy_(tensor, non_blocking=True)
            left.append(self._mark(self._leaving))

    def settle(self) -> None:
        """Wait until the host has everything, before it reads or writes the tensors."""
        self._module.synchronize()

    def _fetch(self, start: int, index: int) -> Any:
        with self._module.stream(self._arriving):
            for name, tensor in self._host.items():
                part = tensor[start : start + self._chunk]
                self._slots[index % _SLOTS][name][: len(part)].copy_(part, non_blocking=True)
        return self._mark(self._arriving)

    def _mark(self, stream: Any) -> Any:
        event = self._module.Event()
        event.record(stream)
        return event
