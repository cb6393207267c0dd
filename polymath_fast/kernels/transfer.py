"""Small tensors on their way to a device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNED = 16  # bytes; kernels are compiled for pointers that are


def stream_of(device: torch.device) -> int:
    """Which stream what is sent now arrives on: what is kept of it is good on that one only."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def send(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """The tensors, contiguous and of the CPU, on `device`, in one copy from pinned memory: the
    host goes on, where a copy of each would wait for all that the device still has to do.

    On a CPU they are returned as they are.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return list(tensors)
    starts, size = [], 0
    for tensor in tensors:
        starts.append(size)
        size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    places = list(zip(starts, tensors, strict=True))
    for start, tensor in places:
        packed[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
    sent = packed.to(device, non_blocking=True)
    return [
        sent[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in places
    ]
