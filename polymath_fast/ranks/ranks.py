"""The processes of one run, as one of them sees them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath_fast.errors import EngineError
from polymath_fast.processes.channel import Channel
from polymath_fast.processes.child import Child

if TYPE_CHECKING:
    import torch
    from torch import Tensor


_PATIENCE = 3.0  # seconds for all members to end; they have nothing to save


class Ranks:
    """Here the process is the only one."""

    rank, size = 0, 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that was started by hand: it writes and shows."""
        return self.rank == 0

    def part(self, count: int) -> int:
        """How many of `count` equal things are this process's."""
        return max(0, -(-(count - self.rank) // self.size))

    def own(self, purpose: str) -> str:
        """`purpose` as a source of randomness of this process alone; the leader's is what it is
        without others."""
        return purpose if self.leads else f"{purpose}/rank {self.rank}"

    def gather(self, value: Any) -> list[Any]:
        """Everybody's `value`, JSON, in the order of ranks; all have to call it.

        Raises EngineError when another process is gone or failed.
        """
        return [value]

    def any(self, flag: bool) -> bool:
        """Whether it is true of any process; all have to call it."""
        return any(self.gather(flag))

    def add(self, tensor: Tensor) -> None:
        """Turn a tensor on the run's device into the sum of everybody's; all have to call it.

        All get the same bytes. Raises as `gather`.
        """

    def close(self) -> None:
        """End the processes that this one started."""


ALONE = Ranks()


class _Several(Ranks):
    """One of `size` processes; they meet in `folder` to add up tensors on `device`."""

    def __init__(self, rank: int, size: int, folder: Path, device: str) -> None:
        self.rank, self.size = rank, size
        self._meeting = folder, device
        self._group: Any = None

    def add(self, tensor: Tensor) -> None:
        self.gather(None)  # one that is gone is noticed here, not by a collective that never ends
        if self._group is None:
            self._group = _process_group(self.rank, self.size, *self._meeting)
        self._group.allreduce([tensor]).wait()


class Leader(_Several):
    """The process that started the others, `children`."""

    def __init__(self, children: Sequence[Child], size: int, folder: Path, device: str) -> None:
        """`children`: the other size - 1, in the order of ranks."""
        super().__init__(0, size, folder, device)
        self._children = children

    def gather(self, value: Any) -> list[Any]:
        channels = [child.channel for child in self._children]
        try:
            values = [value, *(channel.receive("value")["value"] for channel in channels)]
            for channel in channels:
                channel.send("values", values=values)
        except EngineError as error:
            raise EngineError(f"one of the {self.size} processes of this run: {error}") from error
        return values

    def close(self) -> None:
        for child in self._children:
            child.channel.close()  # they end when they hear nothing more
        last = time.monotonic() + _PATIENCE
        for child in self._children:
            child.close(patience=max(0.0, last - time.monotonic()))


class Member(_Several):
    """One that was started, with a channel to the leader."""

    def __init__(self, channel: Channel, rank: int, size: int, folder: Path, device: str) -> None:
        super().__init__(rank, size, folder, device)
        self._channel = channel

    def gather(self, value: Any) -> list[Any]:
        self._channel.send("value", value=value)
        return self._channel.receive("values")["values"]


def _process_group(
    rank: int, size: int, folder: Path, device: str
) -> torch.distributed.ProcessGroup:
    """A group that is not torch's default one: that is vLLM's, with this process alone in it."""
    from torch import distributed

    store = distributed.FileStore(str(folder / "meeting"), size)
    if device == "cuda":
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # nobody outside of this machine
        return distributed.ProcessGroupNCCL(store, rank, size)
    options = distributed.ProcessGroupGloo._Options()
    options._devices = [distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    return distributed.ProcessGroupGloo(store, rank, size, options)
