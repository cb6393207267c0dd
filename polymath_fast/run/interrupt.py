"""Ctrl-C, SIGTERM and SIGHUP as a request to stop after the current step.

    with Interrupt() as interrupt:
        for step in steps:
            train_one_step()
            if interrupt.requested:
                save(); break

The first signal only sets the flag; the second one raises `Stopped`, a KeyboardInterrupt, at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_MESSAGE = b"\nfinishing this step, then saving; once more stops at once and loses it\n"


class Stopped(KeyboardInterrupt):
    """A second signal came. `exit_code` is what a shell expects of it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


class Interrupt:
    """Catches the stop signals of the main thread while the `with` block runs."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """the first signal that came, None when none did"""
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the run should stop after the current step."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What a shell expects: 128 + the number of the signal, 0 when none came."""
        return 128 + self.signal if self.signal is not None else 0

    def __enter__(self) -> Interrupt:
        # Python delivers signals to the main thread only; in any other the caller keeps control.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # nohup ignores SIGHUP on purpose, and a background job of a script SIGINT.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise Stopped(number)
        self.signal = signal.Signals(number)
        # print() could be what the signal interrupted, and it cannot be entered twice.
        with contextlib.suppress(OSError):
            os.write(2, _MESSAGE)
