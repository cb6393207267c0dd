"""A stand-in for torch.cuda on a machine without a GPU: "cuda" is the CPU, Triton interprets.

What it replaces, and nothing else does: where tensors of "cuda" lie, events, streams and memory
counters; which implementation a tensor of that CPU gets; torch.compile, which hands the function
back; products with an fp32 result, which only CUDA has; what the learner has for a CPU alone;
csrc/weight_sync.cu, in torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from polymath_fast.kernels import dense, dispatch
from polymath_fast.kernels.weight_sync import _cuda
from polymath_fast.kernels.weight_sync.table import DTYPES, ROW
from polymath_fast.learner import fused_layers

CHUNK = 49_152
"""elements, as csrc/weight_sync.cu has it"""
_PROPERTIES = SimpleNamespace(
    multi_processor_count=4, L2_cache_size=2**22, total_memory=2**33, major=9, minor=0
)


class OnCpu(TorchFunctionMode):
    """Tensors that are asked for on "cuda" lie in the host's memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple("cpu" if _is_cuda(arg) else arg for arg in args)
        if func in (torch.mm, torch.addmm) and "out_dtype" in kwargs:
            wide, out = kwargs.pop("out_dtype"), kwargs.pop("out", None)
            found = func(*(arg.to(wide) for arg in args), **kwargs)
            return found if out is None else out.copy_(found)
        return func(*args, **kwargs)


class Event:
    """Of torch.cuda; the work is done when a call returns."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing, "elapsed_time needs it"
        self._at: float | None = None
        self._waited = False

    def record(self, stream: Any = None) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        assert self._at is not None
        self._waited = True

    def elapsed_time(self, end: Event) -> float:
        assert end._waited, "a GPU would not have got there yet"
        return 1e3 * (end._at - self._at)


class WeightSync:
    """The C interface of csrc/weight_sync.cu."""

    def polymath_weight_sync(
        self, rows: int, count: int, chunks: int, src: int, dst: int, stream: int
    ) -> int:
        """Copies every segment of the table at address `rows`."""
        table = np.frombuffer((ctypes.c_char * (count * ROW.itemsize)).from_address(rows), ROW)
        for row in table:
            source, target = (
                _matrix(row[name], row["rows"], row["cols"], row[f"{name}_ld"], DTYPES[dtype])
                for name, dtype in (("src", src), ("dst", dst))
            )
            target.copy_(source)
        return 0


def _matrix(address: int, rows: int, cols: int, ld: int, dtype: torch.dtype) -> torch.Tensor:
    size = ((int(rows) - 1) * int(ld) + int(cols)) * dtype.itemsize
    flat = torch.frombuffer((ctypes.c_char * size).from_address(int(address)), dtype=dtype)
    return flat.as_strided((int(rows), int(cols)), (int(ld), 1))


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


def _choose_here(
    op: str, device: torch.device, dtype: torch.dtype, impl: str = "auto", unable: Any = None
) -> tuple[str, str]:
    """As on a Hopper GPU."""
    default = dispatch._default.get()
    options = {"default": default, "capability": (9, 0), "unable": unable or {}}
    return dispatch.choose(op, "cuda", dtype, impl=impl, **options)


_enter = DeviceContext.__init__


def _enter_device(context: DeviceContext, device: torch.device) -> None:
    """`with torch.device(...)`, which comes after `OnCpu`."""
    _enter(context, torch.device("cpu") if _is_cuda(device) else device)


def _compile(function: Any = None, **options: Any) -> Any:
    return function if function is not None else lambda function: function


class _OnCpu(type):
    """`Generator` stays a class: annotations and isinstance use it."""

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return _generator("cpu")

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _generator)


_generator = torch.Generator


class Generator(metaclass=_OnCpu):
    """Of torch, on the CPU."""


@contextlib.contextmanager
def installed():
    """The double in place."""
    cuda = {
        "is_available": lambda: True,
        "get_device_name": lambda device=None: "NVIDIA Rehearsal",
        "get_device_properties": lambda device=None: _PROPERTIES,
        "get_device_capability": lambda device=None: (9, 0),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "current_stream": lambda device=None: SimpleNamespace(cuda_stream=0),
        "device": lambda device: contextlib.nullcontext(),
        "Event": Event,
        "_sleep": lambda cycles: None,
    }
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for owner, name, value in (
            (torch, "compile", _compile),
            (torch, "Generator", Generator),
            (DeviceContext, "__init__", _enter_device),
            (dense, "_add_on_cpu", dense._add_on_gpu),
            (fused_layers, "fuse_embedding", lambda embedding: None),
            (dispatch, "choose_here", _choose_here),
            (dispatch, "library_path", lambda op: Path(__file__)),
            (_cuda, "library", WeightSync),
            (_cuda, "_chunk", lambda: CHUNK),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(OnCpu())
        yield
