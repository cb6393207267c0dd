"""How `python -m` begins a command: before the command's imports, which take seconds."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import NoReturn

_INTERRUPTED, _UNREAD = 130, 141  # as shells have it: 128 and the signal's number


def run(module: str) -> NoReturn:
    """Import `module` and end with what its main() returns; Ctrl-C meanwhile is one line and 130,
    a reader of the output that has gone away ends it with 141.

    What main() makes of Ctrl-C itself comes first.
    """
    try:
        code = _ended(module)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        _say_stopped()
        code = _INTERRUPTED
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # or Python complains too
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = _UNREAD
    sys.exit(code)


def _ended(module: str) -> object:
    """What main() returned, or left with, as --help does."""
    try:
        return _imported(module).main()
    except SystemExit as leaving:
        return leaving.code


def _imported(module: str) -> ModuleType:
    with _ending_at_once():
        from polymath_fast import environment

        environment.prepare()  # before torch is imported, whose threads read it once
        return importlib.import_module(module)


@contextlib.contextmanager
def _ending_at_once() -> Iterator[None]:
    """Ctrl-C inside ends the process where it is: a KeyboardInterrupt in the middle of others'
    imports comes out as any kind of error, or is swallowed."""

    def leave(number: int, frame: object) -> None:
        _say_stopped()
        os._exit(_INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _say_stopped() -> None:
    with contextlib.suppress(OSError):  # a closed terminal is one of the reasons to end
        os.write(2, b"stopped\n")
