"""The child's side of a worker process: a fresh interpreter that answers requests until its parent
is gone. Run by path, with the standard library only; what it serves is named by the first request.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import resource
import signal
import sys
import threading
from typing import IO


def die_with_parent(lifeline: int) -> None:
    """Ends this process group when the parent's end of the pipe `lifeline` closes, however the
    parent ended. On Linux the kernel sends the SIGKILL itself, so a hang in C code dies too."""
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)

    def wait_for_end() -> None:
        # also covers a parent that was gone before the signal was armed
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait_for_end, daemon=True).start()


def take_channel() -> tuple[IO[str], IO[str]]:
    """Requests and replies on private descriptors; what the served code reads is empty, and what
    it prints goes where standard error goes, never into a reply."""
    requests = os.fdopen(os.dup(0), "r", encoding="ascii")
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return requests, replies


def apply_limits(limits: dict[str, int]) -> None:
    """Lowers resource limits, by their name in the `resource` module; never above the hard one."""
    for name, wanted in limits.items():
        which = getattr(resource, name)
        hard = resource.getrlimit(which)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(which, (value, value))


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    requests, replies = take_channel()

    own = os.getpid()

    def send(message: object) -> None:
        if os.getpid() != own:
            os._exit(0)  # the served code forked and returned twice: only one may answer
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    setup = json.loads(requests.readline())
    sys.path[:] = setup["sys_path"]
    service = importlib.import_module(setup["service"])
    handle, greeting = service.start(setup["options"])
    apply_limits(setup["limits"])
    send(greeting)
    for line in requests:
        send(handle(json.loads(line)))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
