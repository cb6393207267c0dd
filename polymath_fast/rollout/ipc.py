"""Weights for an engine in another process of the same GPU: one handle, then one event a sync.

The learner's weights lie in one allocation. The other process maps it once; afterwards a sync is a
line of JSON that says which version is complete and an event that orders the streams. No bytes of
weights pass through the host, and neither process waits for the GPU.

Handles travel as base64; what arrives is checked before it is used.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from polymath_fast.errors import EngineError, UserError
from polymath_fast.processes.channel import Channel

PROTOCOL = 1
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Driver(Protocol):
    """What sharing needs of a device; see `cuda_driver.CudaDriver`."""

    device_id: str

    def shareable(self, address: int) -> bool: ...
    def memory_handle(self, address: int) -> tuple[bytes, int]: ...
    def open_memory(self, handle: bytes) -> int: ...
    def close_memory(self, address: int) -> None: ...
    def new_event(self) -> int: ...
    def event_handle(self, event: int) -> bytes: ...
    def open_event(self, handle: bytes) -> int: ...
    def close_event(self, event: int) -> None: ...
    def record(self, event: int) -> None: ...
    def wait(self, event: int) -> None: ...
    def bytes_at(self, address: int, size: int) -> Tensor: ...


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the shared memory; `offset` in bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Bytes. Raises KeyError for a dtype that is not shared."""
        return torch.Size(self.shape).numel() * _DTYPES[self.dtype].itemsize

    def inside(self, size: int) -> bool:
        """Whether it lies, aligned, within `size` bytes."""
        aligned = self.offset >= 0 and self.offset % _DTYPES[self.dtype].itemsize == 0
        return aligned and min(self.shape, default=1) > 0 and self.offset + self.size <= size


class WeightSender:
    """The learner's side: offers its weights once, then announces each version."""

    def __init__(self, channel: Channel, tensors: Mapping[str, Tensor], driver: Driver) -> None:
        """Offer `tensors` (name -> contiguous view of one allocation) and wait for the answer.

        Raises:
            UserError: the memory cannot be shared, or the other process refuses.
            EngineError: the other process is gone or answers something else.
        """
        self._channel, self._driver = channel, driver
        start, size, places = _layout(tensors)
        if not driver.shareable(start):
            raise UserError(
                "the weights lie in an expandable segment of torch's allocator, which no other "
                "process can open; unset expandable_segments in PYTORCH_ALLOC_CONF, or allocate "
                "them with CudaDriver.allocate"
            )
        handle, offset = driver.memory_handle(start)
        self._complete = driver.new_event()
        channel.send(
            "weights",
            protocol=PROTOCOL,
            device=driver.device_id,
            memory=_text(handle),
            offset=offset,
            size=size,
            complete=_text(driver.event_handle(self._complete)),
            places={name: [p.offset, list(p.shape), p.dtype] for name, p in places.items()},
        )
        answer = channel.receive("opened")
        self._taken = driver.open_event(_bytes(answer, "taken"))

    def push(self, version: int) -> None:
        """The weights as the current stream will have left them are version `version`.

        Returns when the other process has queued its reads; what the current stream gets afterwards
        runs after those.
        """
        self._driver.record(self._complete)
        self._channel.send("version", version=version)
        answer = self._channel.receive("taken")
        if answer.get("version") != version:
            raise EngineError(f"version {answer.get('version')} was taken, not {version}")
        self._driver.wait(self._taken)

    def close(self) -> None:
        """The other process sees the end of the connection."""
        self._channel.close()
        self._driver.close_event(self._complete)
        self._driver.close_event(self._taken)


class WeightReceiver:
    """The engine's side.

    Attributes:
        tensors: name -> the learner's weight, readable between `wait` and `taken`.
        version: of the last `wait`; 0 before.
    """

    def __init__(self, channel: Channel, driver: Driver) -> None:
        """Take the offer. Raises UserError (and tells the learner) when it cannot be taken."""
        self._channel, self._driver = channel, driver
        self.version = 0
        offer = channel.receive("weights")
        try:
            offset, size, places = _accepted(offer, driver.device_id)
            self._base = driver.open_memory(_bytes(offer, "memory"))
            self._complete = driver.open_event(_bytes(offer, "complete"))
        except (UserError, EngineError, RuntimeError) as error:
            channel.send("refused", reason=str(error))
            raise
        self._taken = driver.new_event()
        memory = driver.bytes_at(self._base + offset, size)
        self.tensors = {
            name: memory[p.offset : p.offset + p.size].view(_DTYPES[p.dtype]).view(p.shape)
            for name, p in places.items()
        }
        channel.send("opened", taken=_text(driver.event_handle(self._taken)))

    def wait(self) -> int:
        """The next version; the current stream goes on when its weights are complete.

        The same one may come again: after an update whose gradient was not finite, and when a run
        is resumed that had made none.
        """
        message = self._channel.receive("version")
        version = message.get("version")
        if not isinstance(version, int) or version < self.version:
            raise EngineError(f"version {version!r} after version {self.version}")
        self._driver.wait(self._complete)
        self.version = version
        return version

    def taken(self) -> None:
        """All reads of this version are queued: the learner may write after them."""
        self._driver.record(self._taken)
        self._channel.send("taken", version=self.version)

    def close(self) -> None:
        """Unmap the weights; `tensors` must not be used any more."""
        self.tensors = {}
        self._channel.close()
        self._driver.close_event(self._taken)
        self._driver.close_event(self._complete)
        self._driver.close_memory(self._base)


def _layout(tensors: Mapping[str, Tensor]) -> tuple[int, int, dict[str, Place]]:
    """Address and size of the memory that holds `tensors`, and their places in it."""
    if not tensors:
        raise ValueError("there are no weights to share")
    names = {dtype: name for name, dtype in _DTYPES.items()}
    storages = {t.untyped_storage().data_ptr() for t in tensors.values()}
    for name, tensor in tensors.items():
        if tensor.dtype not in names or not tensor.is_contiguous() or tensor.numel() == 0:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}: "
                f"contiguous {', '.join(_DTYPES)} tensors can be shared"
            )
    if len(storages) != 1:
        raise ValueError(
            f"the weights lie in {len(storages)} allocations; lay them out as views of one tensor"
        )
    start = min(t.data_ptr() for t in tensors.values())
    end = max(t.data_ptr() + t.nbytes for t in tensors.values())
    places = {
        name: Place(t.data_ptr() - start, tuple(t.shape), names[t.dtype])
        for name, t in tensors.items()
    }
    return start, end - start, places


def _accepted(offer: Mapping[str, Any], device: str) -> tuple[int, int, dict[str, Place]]:
    """Offset and size of the offered memory, and the places in it. Raises UserError."""
    if offer.get("protocol") != PROTOCOL:
        raise UserError(
            f"the learner speaks version {offer.get('protocol')} of the protocol, this engine "
            f"{PROTOCOL}: both must run the same polymath_fast"
        )
    if offer.get("device") != device:
        raise UserError(
            f"the learner's weights are on GPU {offer.get('device')}, this engine runs on "
            f"{device}: start both with the same CUDA_VISIBLE_DEVICES"
        )
    try:
        places = {
            name: Place(int(start), tuple(int(n) for n in shape), dtype)
            for name, (start, shape, dtype) in offer["places"].items()
        }
        size, offset = int(offer["size"]), int(offer["offset"])
        outside = [name for name, place in places.items() if not place.inside(size)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the learner's offer is not understood: {error!r}") from None
    if outside or offset < 0:
        raise UserError(f"the learner's {min(outside, default='memory')} lies outside its memory")
    return offset, size, places


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(message: Mapping[str, Any], field: str) -> bytes:
    try:
        data = base64.b64decode(message[field], validate=True)
    except (KeyError, TypeError, binascii.Error) as error:
        raise EngineError(f"the other process sent no handle as {field}: {error!r}") from None
    if len(data) != 64:
        raise EngineError(f"the handle {field} has {len(data)} bytes instead of 64")
    return data
