"""Messages between two processes: JSON with its length in front. Nothing that comes is executed."""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from polymath_fast.errors import EngineError, UserError

MAX_MESSAGE = 1 << 30


class Channel:
    """Messages over a connected socket, with a limit on how long the other side may take."""

    def __init__(self, connection: socket.socket, timeout: float | None) -> None:
        """`timeout`: seconds that a message may take to come or go; None waits for ever."""
        self._socket = connection
        self._socket.settimeout(timeout)
        self.busy = False
        """whether a request has not had all its answers, or broke off before"""

    @contextmanager
    def request(self) -> Iterator[None]:
        """Send one request and take all its answers inside. After an error in there, what comes
        next could be an answer to what was broken off: no other request is made then.

        Raises EngineError when that is so, or inside another request.
        """
        if self.busy:
            raise EngineError("the engine's process is still at work on what was broken off")
        self.busy = True
        yield
        self.busy = False

    def waiting(self) -> bool:
        """Whether something has come, or the other side is gone; does not wait."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        return bool(poller.poll(0))

    def send(self, kind: str, **content: Any) -> None:
        """Raises EngineError when the other side is gone."""
        body = json.dumps({"kind": kind, **content}).encode()
        try:
            self._socket.sendall(struct.pack("<I", len(body)) + body)
        except OSError as error:
            raise EngineError(f"the other process is gone ({error})") from error

    def fail(self, error: UserError | EngineError) -> None:
        """Let the other side's `receive` raise an error of this kind, if it is still there."""
        kind = "refused" if isinstance(error, UserError) else "failed"
        with suppress(EngineError):
            self.send(kind, reason=str(error))

    def receive(self, *kinds: str) -> dict[str, Any]:
        """The next message. Raises EngineError when it does not come, or is none of `kinds`; what
        the other side's `fail` sent is raised unless asked for."""
        (size,) = struct.unpack("<I", self._exactly(4))
        if size > MAX_MESSAGE:
            raise EngineError(f"a message of {size} bytes; {MAX_MESSAGE} are the most")
        try:
            message = json.loads(self._exactly(size))
            kind = message["kind"]
        except (ValueError, TypeError, KeyError) as error:
            raise EngineError(f"the other process sent no message of ours: {error!r}") from None
        if kind in kinds:
            return message
        if kind == "refused":
            raise UserError(f"the other process refused: {message.get('reason')}")
        if kind == "failed":
            raise EngineError(f"the other process failed: {message.get('reason')}")
        raise EngineError(f"the other process sent {kind!r}, expected {' or '.join(kinds)}")

    def close(self) -> None:
        """Say no more."""
        self._socket.close()

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self._socket.recv(size - len(parts))
            except TimeoutError:
                seconds = self._socket.gettimeout()
                raise EngineError(f"the other process was silent for {seconds:g} s") from None
            except OSError as error:
                raise EngineError(f"the other process is gone ({error})") from error
            if not part:
                raise EngineError("the other process ended, or closed the connection")
            parts += part
        return bytes(parts)
