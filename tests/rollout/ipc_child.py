"""The engine's process of test_ipc: copies every version out and reports what it got.

Usage: ipc_child.py SOCKET_FD cpu|cuda VERSIONS
"""

from __future__ import annotations

import socket
import sys

import torch

from polymath_fast.kernels import SegmentTable, weight_sync
from polymath_fast.processes.channel import Channel
from polymath_fast.rollout.engine_process import make_driver
from polymath_fast.rollout.ipc import WeightReceiver


def main(fd: int, device: str, versions: int) -> None:
    driver = make_driver(device)
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
