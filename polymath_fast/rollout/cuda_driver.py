"""The few calls of CUDA's driver that share memory and events between processes, through ctypes.

The library comes with the GPU's driver, so nothing has to be compiled. Addresses and events are
plain integers here, handles 64 plain bytes that may travel through any pipe.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from polymath_fast.errors import UserError

HANDLE_BYTES = 64
_LEGACY_IPC_CAPABLE = 10  # CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE
_EVENT_FLAGS = 2 | 4  # no timing, between processes
_ENABLE_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    """CUipcMemHandle and CUipcEventHandle."""

    _fields_ = [("data", ctypes.c_ubyte * HANDLE_BYTES)]


class CudaDriver:
    """libcuda.so.1, on one device of this process."""

    def __init__(self, device: int = 0) -> None:
        """Raises UserError where there is no driver or no such device."""
        if not torch.cuda.is_available() or device >= torch.cuda.device_count():
            raise UserError(f"there is no CUDA device {device} here to share memory on")
        self.device = device
        # driver calls use the context that is current, which the first allocation makes
        torch.cuda.set_device(device)
        torch.empty(1, device=f"cuda:{device}")
        self._lib = _library()

    @property
    def device_id(self) -> str:
        """The same in every process that sees this GPU, whatever number it has there."""
        return str(torch.cuda.get_device_properties(self.device).uuid)

    def allocate(self, size: int) -> int:
        """Address of `size` bytes that can be shared, outside of torch's allocator."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def free(self, address: int) -> None:
        """Give back what `allocate` gave."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def shareable(self, address: int) -> bool:
        """Whether the allocation of `address` can be given a handle; expandable segments cannot."""
        answer = ctypes.c_uint()
        self._call(
            "cuPointerGetAttribute",
            ctypes.byref(answer),
            ctypes.c_int(_LEGACY_IPC_CAPABLE),
            ctypes.c_uint64(address),
        )
        return bool(answer.value)

    def memory_handle(self, address: int) -> tuple[bytes, int]:
        """Handle of the allocation that holds `address`, and how far into it that lies."""
        base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
        self._call(
            "cuMemGetAddressRange_v2",
            ctypes.byref(base),
            ctypes.byref(size),
            ctypes.c_uint64(address),
        )
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), base)
        return bytes(handle.data), address - base.value

    def open_memory(self, handle: bytes) -> int:
        """Address in this process of another one's allocation."""
        address = ctypes.c_uint64()
        flags = ctypes.c_uint(_ENABLE_PEER_ACCESS)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), _handle(handle), flags)
        return address.value

    def close_memory(self, address: int) -> None:
        """Unmap what `open_memory` mapped."""
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def new_event(self) -> int:
        """An event that other processes can wait for."""
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(_EVENT_FLAGS))
        return event.value

    def event_handle(self, event: int) -> bytes:
        """What another process opens it by."""
        handle = _Handle()
        self._call("cuIpcGetEventHandle", ctypes.byref(handle), ctypes.c_void_p(event))
        return bytes(handle.data)

    def open_event(self, handle: bytes) -> int:
        """Another process's event."""
        event = ctypes.c_void_p()
        self._call("cuIpcOpenEventHandle", ctypes.byref(event), _handle(handle))
        return event.value

    def close_event(self, event: int) -> None:
        """Give back an event, made or opened."""
        self._call("cuEventDestroy_v2", ctypes.c_void_p(event))

    def record(self, event: int) -> None:
        """Mark what the current stream has been given so far."""
        self._call("cuEventRecord", ctypes.c_void_p(event), self._stream())

    def wait(self, event: int) -> None:
        """Keep the current stream, not the host, from going on before the event's last mark."""
        self._call("cuStreamWaitEvent", self._stream(), ctypes.c_void_p(event), ctypes.c_uint(0))

    def bytes_at(self, address: int, size: int) -> Tensor:
        """(size,) uint8 tensor of that memory, which must outlive it."""
        return torch.as_tensor(_Bytes(address, size), device=f"cuda:{self.device}")

    def _stream(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)

    def _call(self, name: str, *args: object) -> None:
        with torch.cuda.device(self.device):
            code = getattr(self._lib, name)(*args)
        if code:
            text = ctypes.c_char_p()
            self._lib.cuGetErrorString(code, ctypes.byref(text))
            reason = text.value.decode() if text.value else "unknown error"
            raise RuntimeError(f"{name}: {reason} (CUDA driver error {code})")


class _Bytes:
    """Memory as torch takes it from other libraries."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


def _handle(data: bytes) -> _Handle:
    return _Handle.from_buffer_copy(data)


@cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UserError(f"CUDA's driver library does not load: {error}") from None
