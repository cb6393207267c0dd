"""Two processes and one set of weights, and a process that dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shared_weights import weights_on

from polymath_fast.errors import EngineError
from polymath_fast.processes.channel import Channel
from polymath_fast.rollout.host_memory import HostMemory
from polymath_fast.rollout.ipc import WeightSender

CHILD = Path(__file__).with_name("ipc_child.py")
ROOT = Path(__file__).parents[2]


def start_child(theirs: socket.socket, device: str, versions: int) -> subprocess.Popen:
    fd = theirs.fileno()
    command = [sys.executable, str(CHILD), str(fd), device, str(versions)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, pass_fds=[fd], env=environment)
    theirs.close()
    return child


def train(driver: Any, name: str, ours: socket.socket, theirs: socket.socket) -> None:
    """Three versions to a child; the weights change again right after each push."""
    child = start_child(theirs, name, 3)
    try:
        channel = Channel(ours, 60)
        weights = weights_on(driver)
        sender = WeightSender(channel, weights, driver)
        for version in (1, 2, 3):
            for weight in weights.values():
                weight.fill_(version)
            sender.push(version)
            for weight in weights.values():
                weight.fill_(100.0)
            answer = channel.receive("sums")
            expected = {n: float(version * w.numel()) for n, w in weights.items()}
            assert (answer["version"], answer["sums"]) == (version, expected)
        assert child.wait(60) == 0
        with pytest.raises(EngineError, match="the other process"):
            sender.push(4)
    finally:
        child.kill()
        child.wait()


def test_two_processes(sockets: tuple[socket.socket, socket.socket]) -> None:
    train(HostMemory(), "cpu", *sockets)


@pytest.mark.gpu
def test_two_processes_on_one_gpu(sockets: tuple[socket.socket, socket.socket]) -> None:
    from polymath_fast.rollout.cuda_driver import CudaDriver

    train(CudaDriver(), "cuda", *sockets)


@pytest.mark.gpu
def test_expandable_segments_are_told_from_memory_that_can_be_shared() -> None:
    code = (
        "import torch\n"
        "from polymath_fast.rollout.cuda_driver import CudaDriver\n"
        "driver = CudaDriver()\n"
        "inside = torch.zeros(1 << 20, device='cuda').data_ptr()\n"
        "print(driver.shareable(inside), driver.shareable(driver.allocate(1 << 20)))"
    )
    for setting, expected in (("True", "False True"), ("False", "True True")):
        allocator = {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{setting}"}
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | allocator
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert run.stdout.strip() == expected, run.stderr


def test_a_child_that_is_killed_is_an_engine_error(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    driver = HostMemory()
    child = start_child(sockets[1], "cpu", 3)
    try:
        sender = WeightSender(Channel(sockets[0], 60), weights_on(driver), driver)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        with pytest.raises(EngineError, match="the other process"):
            sender.push(1)
    finally:
        child.kill()
        child.wait()
