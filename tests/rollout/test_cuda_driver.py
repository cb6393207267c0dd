"""Calls of the CUDA driver through ctypes, against a library of the same prototypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from polymath_fast.rollout.cuda_driver import CudaDriver  # noqa: E402

HEADERS = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
SOURCE = Path(__file__).with_name("fake_libcuda.cpp")
ADDRESS, EVENT, STREAM = 0x7F1234567000, 0x5500000000E0, 0x5600000000F0

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not (HEADERS / "cuda.h").is_file(),
    reason="needs g++ and the CUDA header that comes with Triton",
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("driver") / "libcuda.so"
    command = ["g++", "-shared", "-fPIC", f"-I{HEADERS}", str(SOURCE), "-o", str(path)]
    subprocess.run(command, check=True)
    lib = ctypes.CDLL(str(path))
    lib.fake_calls.restype = ctypes.c_char_p
    return lib


@pytest.fixture
def driver(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> CudaDriver:
    stream = SimpleNamespace(cuda_stream=STREAM)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    library.fake_forget()
    made = CudaDriver.__new__(CudaDriver)
    made.device, made._lib = 0, library
    return made


def test_memory(driver: CudaDriver, library: ctypes.CDLL) -> None:
    assert driver.allocate(3 << 32) == ADDRESS
    assert driver.shareable(ADDRESS) and not driver.shareable(0x7F0000000000)
    handle, offset = driver.memory_handle(ADDRESS + 0x120)
    assert len(handle) == 64 and offset == 0x120
    assert driver.open_memory(handle) == ADDRESS
    driver.close_memory(ADDRESS)
    driver.free(ADDRESS)
    assert library.fake_calls().decode().splitlines() == [
        "alloc 12884901888",
        "open memory 7f1234567000 1",
        "close memory 7f1234567000",
        "free 7f1234567000",
    ]


def test_events(driver: CudaDriver, library: ctypes.CDLL) -> None:
    event = driver.new_event()
    handle = driver.event_handle(event)
    assert event == EVENT and len(handle) == 64 and driver.open_event(handle) == EVENT
    driver.record(event)
    driver.wait(event)
    driver.close_event(event)
    assert library.fake_calls().decode().splitlines() == [
        "event 6",
        "record 0x5500000000e0 on 0x5600000000f0",
        "0x5600000000f0 waits for 0x5500000000e0 0",
        "destroy 0x5500000000e0",
    ]


def test_errors_say_what_failed(driver: CudaDriver) -> None:
    with pytest.raises(RuntimeError, match=r"cuMemAlloc_v2: out of memory .CUDA driver error 2"):
        driver.allocate(1 << 41)
    with pytest.raises(RuntimeError, match=r"cuIpcOpenMemHandle_v2: unknown error .* error 400"):
        driver.open_memory(bytes(64))
