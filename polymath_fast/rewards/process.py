"""The parent's side of one worker process: spawn, non-blocking request and reply, kill."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_WORKER = str(Path(__file__).with_name("_worker.py"))
_MAX_REPLY = 64 * 2**20
_KEPT_OUTPUT = 4000


def _above_the_standard_ones(descriptor: int) -> int:
    """Where this process has no stdin, stdout or stderr, a pipe takes their numbers, on which the
    child would get its own ones."""
    if descriptor > 2:
        return descriptor
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(descriptor)
    return moved


class WorkerProcess:
    """A child interpreter in a session of its own: Ctrl-C at the terminal does not reach it, and
    killing its group takes what it forked along. It holds none of this process's descriptors."""

    def __init__(self, setup: dict[str, Any], deadline: float) -> None:
        """Returns at once; `ready` turns true when the greeting has arrived.

        Args:
            setup: service, options, limits, as JSON.
            deadline: time.monotonic() by which the caller wants the greeting.
        """
        lifeline, self._lifeline = (_above_the_standard_ones(end) for end in os.pipe())
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", _WORKER, str(lifeline)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(lifeline,),
                start_new_session=True,
                bufsize=0,
            )
        finally:
            os.close(lifeline)
        self.pid = self._process.pid
        self.deadline = deadline
        self.busy = True
        self.ready = False
        self.greeting: Any = None
        self.replied = False
        self._reply: Any = None
        self._outbox = bytearray()
        self._inbox = bytearray()
        self._output = b""
        self._noise_is_open = True
        self._cause = ""
        self._dead = False
        self._input = self._process.stdin.fileno()  # type: ignore[union-attr]
        self._replies = self._process.stdout.fileno()  # type: ignore[union-attr]
        self._noise = self._process.stderr.fileno()  # type: ignore[union-attr]
        for descriptor in (self._input, self._replies, self._noise):
            os.set_blocking(descriptor, False)
        self._write({**setup, "sys_path": [str(folder) for folder in sys.path]})

    @property
    def ended(self) -> bool:
        """Whether the process is gone or was given up."""
        return self._dead

    def send(self, request: object, deadline: float) -> None:
        """Hands `request` over; `replied` turns true when the answer is there."""
        self.busy, self.deadline = True, deadline
        self._write(request)

    def take_reply(self) -> Any:
        """The answer to the last request."""
        self.replied = False
        return self._reply

    def obituary(self) -> str:
        """How the process ended, with the last lines it printed."""
        code = self._process.poll()
        how = self._cause or (f"exit code {code}" if code is None or code >= 0 else _signal(-code))
        lines = self._output.decode("utf-8", "replace").strip().splitlines()
        return f"{how}: {lines[-1]}" if lines else how

    def kill(self, cause: str = "") -> None:
        """Ends the process group at once and frees the descriptors. Harmless when repeated."""
        self._dead = True
        self._cause = self._cause or cause
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            stream.close()  # type: ignore[union-attr]
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def watch(self, poller: select.poll) -> None:
        """Registers this process's descriptors."""
        poller.register(self._replies, select.POLLIN)
        if self._noise_is_open:
            poller.register(self._noise, select.POLLIN)
        if self._outbox:
            poller.register(self._input, select.POLLOUT)

    def advance(self) -> None:
        """Moves what can be moved without waiting; notices the process's end."""
        # looked at first: what the process wrote before its end is then in the pipes
        gone = self._process.poll() is not None
        self._flush()
        noise, self._noise_is_open = _drain(self._noise, 2**20)
        self._output = (self._output + noise)[-_KEPT_OUTPUT:]
        received, is_open = _drain(self._replies, _MAX_REPLY)
        self._inbox += received
        if received and b"\n" in received:
            self._receive(bytes(self._inbox).partition(b"\n")[0])
        elif gone:
            self._dead = True
        elif not is_open:
            self._await_end()
        elif len(self._inbox) > _MAX_REPLY:
            self.kill("its reply was too long")

    def _await_end(self) -> None:
        """A closed channel is mostly the first sign of an end; the exit code follows at once."""
        try:
            self._process.wait(timeout=1.0)
            self._dead = True
        except subprocess.TimeoutExpired:
            self.kill("it closed its channel")

    def _receive(self, line: bytes) -> None:
        self._inbox.clear()
        self.busy = False
        try:
            message = json.loads(line)
        except ValueError:
            self._dead, self._cause = True, "its reply was not readable"
            return
        if self.ready:
            self.replied, self._reply = True, message
        else:
            self.ready, self.greeting = True, message

    def _write(self, message: object) -> None:
        self._outbox += json.dumps(message).encode("ascii") + b"\n"
        self._flush()

    def _flush(self) -> None:
        try:
            while self._outbox:
                del self._outbox[: os.write(self._input, self._outbox[: 2**16])]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._outbox.clear()


def wait_for_any(workers: Sequence[WorkerProcess], seconds: float) -> None:
    """Waits until one of `workers` can advance, or for `seconds`; then advances all of them."""
    poller = select.poll()
    alive = [worker for worker in workers if not worker.ended]
    for worker in alive:
        worker.watch(poller)
    poller.poll(seconds * 1000)
    for worker in alive:
        worker.advance()


def _drain(descriptor: int, most: int) -> tuple[bytes, bool]:
    """What a non-blocking pipe holds, `most` bytes or a little more, and whether it is open."""
    received = bytearray()
    while len(received) < most:
        try:
            chunk = os.read(descriptor, 2**16)
        except BlockingIOError:
            break
        if not chunk:
            return bytes(received), False
        received += chunk
    return bytes(received), True


def _signal(number: int) -> str:
    try:
        return f"killed by {signal.Signals(number).name}"
    except ValueError:
        return f"killed by signal {number}"
