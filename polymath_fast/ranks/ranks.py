"""The processes of one run, as one of them sees them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath_fast.errors import EngineError
from polymath_fast.processes.channel import Channel
from polymath_fast.processes.child import Child

if TYPE_CHECKING:
    import torch
    from torch import Tensor


_PATIENCE = 3.0  # seconds for all members to end; they have nothing to save
_GLANCE = 0.01  # seconds between looks at the members' sockets
_MUSTER = 600.0  # seconds for a member to finish what it samples or evaluates


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

    def add_parts(self, tensor: Tensor, bounds: Sequence[int]) -> None:
        """As `add`, but only elements [bounds[r], bounds[r + 1]) of process r become the sum; what
        is left of the others is worth nothing."""

    def share_parts(self, tensor: Tensor, bounds: Sequence[int]) -> None:
        """Give all processes elements [bounds[r], bounds[r + 1]) of process r's tensor, for all r;
        all have to call it. Raises as `gather`."""

    def muster(self, error: Exception) -> None:
        """After `error`, which not all need to have met: all break off what they do and come to
        one place, from where they may `gather` again. The leader calls them; the others call this
        whenever they failed, also by another's failure.

        Raises EngineError when a process is gone, or the leader ends without calling.
        """

    def close(self) -> None:
        """Leave the others, and end the processes that this one started."""


ALONE = Ranks()


class _Several(Ranks):
    """One of `size` processes; they meet in `folder` to add up tensors on `device`."""

    def __init__(self, rank: int, size: int, folder: Path, device: str) -> None:
        self.rank, self.size = rank, size
        self._meeting = folder, device
        self._group: Any = None

    def add(self, tensor: Tensor) -> None:
        self._together(lambda group: [group.allreduce([tensor])])

    def add_parts(self, tensor: Tensor, bounds: Sequence[int]) -> None:
        from torch.distributed import ReduceOptions

        def launch(group: Any) -> Iterable[Any]:
            for rank, part in _parts(tensor, bounds):
                options = ReduceOptions()
                options.rootRank = rank
                yield group.reduce([part], options)

        self._together(launch)

    def share_parts(self, tensor: Tensor, bounds: Sequence[int]) -> None:
        import torch
        from torch.distributed import BroadcastOptions

        def launch(group: Any) -> Iterable[Any]:
            for rank, part in _parts(tensor, bounds):
                options = BroadcastOptions()
                options.rootRank = rank
                yield group.broadcast([part.view(torch.uint8)], options)

        self._together(launch)

    def _together(self, launch: Callable[[Any], Iterable[Any]]) -> None:
        """Start the collectives that `launch(group)` gives, then wait for them all (on a GPU its
        stream does, not the host)."""
        import torch

        self.gather(None)  # one that is gone is noticed here, not by a collective that never ends
        if self._group is None:
            self._group = _process_group(self.rank, self.size, *self._meeting)
        try:
            for work in list(launch(self._group)):
                work.wait()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise EngineError(
                f"what the {self.size} processes of this run exchange broke off: {error}"
            ) from error

    def close(self) -> None:
        # NCCL's group has a thread that looks into `folder` every second, and waits five minutes
        # where that is gone; the group would wait for the thread.
        group, self._group = self._group, None
        if group is not None:
            group.abort()


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

    def muster(self, error: Exception) -> None:
        away = {rank: child.channel for rank, child in enumerate(self._children, start=1)}
        last = time.monotonic() + _MUSTER
        for rank, channel in away.items():
            with _naming(rank):
                channel.send("muster")
        while away:
            time.sleep(_GLANCE)  # not for the first alone: it may wait for one that is gone
            for rank, channel in list(away.items()):
                with _naming(rank):
                    if channel.waiting() and _mustered(channel):
                        del away[rank]
                    elif time.monotonic() > last:
                        raise EngineError(f"no answer for {_MUSTER:g} s")

    def close(self) -> None:
        for child in self._children:
            child.channel.close()  # they end when they hear nothing more
        last = time.monotonic() + _PATIENCE
        for child in self._children:
            child.close(patience=max(0.0, last - time.monotonic()))
        super().close()


class Member(_Several):
    """One that was started, with a channel to the leader."""

    def __init__(self, channel: Channel, rank: int, size: int, folder: Path, device: str) -> None:
        super().__init__(rank, size, folder, device)
        self._channel = channel
        self._called = False

    def gather(self, value: Any) -> list[Any]:
        self._channel.send("value", value=value)
        message = self._channel.receive("values", "muster")
        if message["kind"] == "muster":
            self._called = True
            raise EngineError("another process of this run failed")
        return message["values"]

    def muster(self, error: Exception) -> None:
        if not self._called:
            self._channel.fail(error)
            while self._channel.receive("values", "muster")["kind"] != "muster":
                pass
        self._called = False
        self._channel.send("mustered")


@contextmanager
def _naming(rank: int) -> Iterator[None]:
    try:
        yield
    except EngineError as error:
        raise EngineError(f"process {rank} of this run is lost ({error})") from error


def _mustered(channel: Channel) -> bool:
    """Whether the next message says so; what was sent before is of no use any more."""
    return channel.receive("mustered", "value", "failed", "refused")["kind"] == "mustered"


def _parts(tensor: Tensor, bounds: Sequence[int]) -> list[tuple[int, Tensor]]:
    """Each process that has a part of the tensor, and that."""
    spans = enumerate(zip(bounds, bounds[1:], strict=False))
    return [(rank, tensor[first:last]) for rank, (first, last) in spans if first < last]


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
