"""Starting the other processes of a run, each with a GPU, or its part of the cores, of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from polymath_fast import machine
from polymath_fast.config import Config
from polymath_fast.errors import UserError
from polymath_fast.processes.child import Child
from polymath_fast.ranks import member
from polymath_fast.ranks.ranks import ALONE, Leader, Ranks


@contextmanager
def launched(
    config: Config, device: str, run_dir: Path, checkpoint: tuple[Path, int] | None
) -> Iterator[Ranks]:
    """The processes of a run on `device` ("cpu" or "cuda"), which begin or go on where this one
    does, see `member.Invitation`. On a CPU each has its share of the cores."""
    size = config.num_processes
    if size == 1:
        yield ALONE
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="polymath_fast_")))
        shares = core_shares(size) if device == "cpu" else []
        children: list[Child] = []
        leader = Leader(children, size, folder, device)
        stack.callback(leader.close)
        for rank in range(1, size):
            variables = {} if device == "cpu" else {"CUDA_VISIBLE_DEVICES": visible_devices()[rank]}
            children.append(Child(member.__name__, variables))
            children[-1].channel.send(
                "start",
                rank=rank,
                size=size,
                folder=str(folder),
                device=device,
                cores=shares[rank] if shares else [],
                config=asdict(config),
                run_dir=str(run_dir),
                checkpoint=(str(checkpoint[0]), checkpoint[1]) if checkpoint else None,
            )
        if shares:
            stack.enter_context(_on_cores(shares[0]))
        yield leader


def require_devices(config: Config, device: str) -> None:
    """Raise UserError where there are fewer devices, or cores, than processes."""
    asked = config.num_processes
    if asked == 1:
        return
    found = len(visible_devices()) if device == "cuda" else machine.cores()
    if asked > found:
        kind = "GPUs" if device == "cuda" else "cores"
        works = f"--num-processes {found} works" if found > 1 else "leave it out"
        raise UserError(
            f"--num-processes is {asked}, one for each device, but this run sees {found} {kind}; "
            f"{works}"
        )


def visible_devices() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that torch sees here, in its order."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    names = named.split(",") if named else map(str, range(count))
    return [name.strip() for name in names][:count]


def core_shares(size: int) -> list[list[int]]:
    """The cores of this process in `size` parts, neighbours together."""
    cores = sorted(os.sched_getaffinity(0))
    bounds = [len(cores) * part // size for part in range(size + 1)]
    return [cores[bounds[part] : bounds[part + 1]] for part in range(size)]


@contextmanager
def _on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Inside, all threads that there are now, and those they start, keep to `cores`."""
    before = {}
    for task in map(int, os.listdir("/proc/self/task")):
        with suppress(OSError):  # it has ended
            before[task] = os.sched_getaffinity(task)
            os.sched_setaffinity(task, cores)
    try:
        yield
    finally:
        for task, used in before.items():
            with suppress(OSError):
                os.sched_setaffinity(task, used)
