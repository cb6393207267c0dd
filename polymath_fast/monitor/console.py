"""What a run shows on the terminal: escaped text, tables of completions, panels.

Model text and file names are hostile here: `printable` makes every control character visible, and
they reach rich as Text, never as markup. A terminal that goes away never ends a run.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.box import ROUNDED, SIMPLE_HEAD
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

# Control characters, bidirectional overrides and lone surrogates; newline and tab stay.
_HIDDEN = [
    *(code for code in range(0x20) if chr(code) not in "\n\t"),
    *range(0x7F, 0xA0),
    *(0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),
]
_VISIBLE = {code: (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}") for code in _HIDDEN}


def printable(text: str, limit: int | None = None) -> str:
    """`text` with every character that could move a cursor or reorder a line made visible.

    With a `limit`, the middle of longer texts is left out: a completion's end holds its answer.
    """
    if limit is not None and len(text) > limit:
        head = limit // 3
        text = f"{text[:head]} [...{len(text) - limit} characters...] {text[head - limit :]}"
    return text.translate(_VISIBLE)


def print_error(error: Exception) -> None:
    """The line with which a command ends; a reward's own message in it may hold model text."""
    say(f"error: {printable(str(error))}")


def say(line: str) -> None:
    """Print on stderr, if it is still there: a closed terminal is one of the reasons to end."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


class SafeStream:
    """A text stream that goes silent, instead of raising, once nobody reads it any more."""

    def __init__(self, stream: TextIO | None) -> None:
        # Python sets sys.stdout to None when the process was started with it closed.
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self.alive = True

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write `text`; characters that the stream cannot encode become question marks."""
        encodable = text.encode(self.encoding, "replace").decode(self.encoding)
        self._try(lambda: self._stream.write(encodable))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        try:
            return self.alive and self._stream.isatty()
        except ValueError:
            return False

    def fileno(self) -> int:
        return self._stream.fileno()

    def _try(self, action: Any) -> None:
        if not self.alive:
            return
        try:
            action()
        except BlockingIOError:
            return  # a slow reader of a non-blocking pipe: this piece is lost, later ones are not
        except (OSError, ValueError):
            self.alive = False
            self._discard()

    def _discard(self) -> None:
        # Libraries print to the same file descriptor, and theirs would raise next.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


_NARROWEST = 20  # columns


def make_console() -> Console:
    """A rich console on stdout that survives a closed terminal or pipe."""
    console = Console(file=SafeStream(sys.stdout), highlight=False)  # type: ignore[arg-type]
    if console.width < _NARROWEST:  # COLUMNS=0 and the like: nothing would be shown at all
        console.width = 80
    return console


def completions_table(step: int, picks: Mapping[str, Mapping[str, Any]]) -> Table:
    """Best, worst and random completion of a step, text escaped and shortened."""
    table = Table(
        title=f"completions of step {step}", box=SIMPLE_HEAD, expand=True, show_lines=True
    )
    table.add_column("reward", no_wrap=True, width=8)
    table.add_column("completion", ratio=1, overflow="fold")
    for label, row in picks.items():
        reward = row.get("reward")
        shown = "excluded" if reward is None else f"{reward:.3g}"
        facts = f"{label}\n{shown}\n{row.get('length', '?')} tok"
        text = printable(str(row.get("completion", "")), limit=480)
        table.add_row(Text(facts), Text(text.expandtabs(4).strip() or "(empty)"))
    return table


def panel(title: str, facts: Mapping[str, Any]) -> Panel:
    """Names on the left, values on the right."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(Text(printable(str(name))), Text(printable(str(value), limit=600)))
    return Panel(grid, title=Text(title), title_align="left", box=ROUNDED, padding=(0, 1))
