"""Starting one of our own modules as a process on a socket, and ending it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping

from polymath_fast import environment
from polymath_fast.errors import EngineError
from polymath_fast.processes.channel import Channel

_PATIENCE = 30.0  # seconds a process has to end after it was asked to
_PR_SET_PDEATHSIG = 1


class Child:
    """A process that runs `python -m module`, whose main() calls `inherited`; it ends with the
    thread that started it."""

    def __init__(self, module: str, variables: Mapping[str, str] | None = None) -> None:
        """`variables` of the environment are set for it alone."""
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(filter(None, sys.path))
        with theirs:
            # A session of its own: an interrupt at the terminal reaches the parent alone.
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": path} | dict(variables or {}),
            )
        self.channel = Channel(ours, timeout=None)

    def close(self, *, ask: str | None = None, patience: float = _PATIENCE) -> None:
        """Wait until it ends, which it is asked for with a message `ask`, or kill it after
        `patience` seconds."""
        if self.channel.busy:  # interrupted while it worked: there is nothing to wait for
            self.process.kill()
        if self.process.poll() is None:
            try:
                if ask is not None:
                    self.channel.send(ask)
                self.process.wait(patience)
            except (EngineError, subprocess.TimeoutExpired):
                self.process.kill()
        self.process.wait()
        self.channel.close()


def inherited(descriptor: int) -> Channel:
    """The socket to the parent, for the main() of such a process.

    The parent decides about interrupts, and nobody is left behind when it is killed, or when the
    thread ends that started this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    environment.prepare()
    return Channel(socket.socket(fileno=descriptor), timeout=None)
