"""What this process may use: cores, a GPU, and memory, of which containers limit some.

Linux counts a container's memory in a control group, whose limit neither `sysconf` nor
/proc/meminfo knows; a process that trusts them is killed without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from polymath_fast.errors import UserError


class _Files(NamedTuple):
    """Where one version of control groups has its figures."""

    mount: str
    limit: str
    used: str
    idle: str
    """what memory.stat calls the file pages that the kernel would give back at once"""


_V1 = _Files(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
)
_V2 = _Files("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def cores() -> int:
    """Processor cores; fewer than the machine has where the process is bound to some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device(asked: str) -> str:
    """What --device asks for, as cpu or cuda. Raises UserError for a GPU that is not there."""
    import torch

    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise UserError("--device cuda: torch sees no CUDA device here; --device cpu works")
    return "cuda" if available and asked != "cpu" else "cpu"


def memory_bytes(root: Path = Path("/")) -> int:
    """All there is for this process and its neighbours."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *(limit for limit, _ in _limits(root))])


def free_memory_bytes(root: Path = Path("/")) -> int | None:
    """What is left of it now, with what the kernel would give back; None where nobody tells."""
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            left = [max(0, limit - used) for limit, used in _limits(root)]
            return min([int(line.split()[1]) * 1024, *left])
    return None


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of every control group with a limit that this process is in."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files = _V1 if controllers else _V2
        mount = root / files.mount
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            limit = _text(folder / files.limit).strip()
            if limit.isdecimal():  # else "max", or a group that a container does not see
                yield int(limit), _used(folder, files)
            if folder == mount:
                break


def _used(folder: Path, files: _Files) -> int:
    idle = 0
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == files.idle:
            idle = int(value)
    return int(_text(folder / files.used) or 0) - idle


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
