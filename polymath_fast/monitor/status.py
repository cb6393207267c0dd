"""The one line that says where a run is: redrawn in place on a terminal, one line a step elsewhere.

step 12/200  reward 0.412  length 62  tok/s 480  memory 1.90 GiB  ETA 3:10
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

_BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_BARS_WIDTH = 24
# How many steps the ETA looks back: enough to smooth, few enough to follow longer completions.
_ETA_STEPS = 10


class Status:
    """The status of a run of `total` steps that begins after `start_step`."""

    def __init__(self, console: Console, start_step: int, total: int) -> None:
        self._console = console
        self._live: Live | None = None
        self._step, self._total = start_step, total
        self._row: Mapping[str, Any] = {}
        self._phase = ""
        self._rewards: deque[float] = deque(maxlen=_BARS_WIDTH)
        self._ends: deque[float] = deque(maxlen=_ETA_STEPS + 1)
        self._utf8 = console.encoding.lower().startswith("utf")
        self._spinner = Spinner("dots" if self._utf8 else "line", style="cyan")

    def show(self, row: Mapping[str, Any]) -> None:
        """A step ended with these metrics."""
        self._row, self._step, self._phase = row, row["step"], ""
        self._rewards.append(row["reward/mean"])
        if not self._ends:
            # What came before the first step (engine start, evaluation) will not come again.
            self._ends.append(time.monotonic() - (row.get("time/step") or 0.0))
        self._ends.append(time.monotonic())
        if self._redraws():
            self._redraw()
        else:
            self._console.print(fit(self._fields(), 1000), soft_wrap=True)

    def phase(self, name: str) -> None:
        """The run now does `name`; plain lines do not show it."""
        self._phase = name
        if self._redraws():
            self._redraw()

    def stop(self) -> None:
        """Remove the live line from the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _redraws(self) -> bool:
        return self._console.is_terminal and not self._console.is_dumb_terminal

    def _redraw(self) -> None:
        if self._live is None:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()
        self._live.refresh()

    def _fields(self) -> list[tuple[int, str, str]]:
        """(rank, label, value) in the order of display; a higher rank is left out earlier."""
        found = [(0, "step", f"{self._step}/{self._total}")]
        for rank, label, key, form in (
            (1, "reward", "reward/mean", "{:.3f}"),
            (4, "length", "completion/mean_length", "{:.0f}"),
            (3, "tok/s", "throughput/completion_tokens_per_s", "{:,.0f}"),
            (5, "memory", "memory/peak_gib", "{:.2f} GiB"),
        ):
            if self._row.get(key) is not None:
                found.append((rank, label, form.format(self._row[key])))
        steps = len(self._ends) - 1
        if steps > 0 and self._step < self._total:
            mean = (self._ends[-1] - self._ends[0]) / steps
            found.append((2, "ETA", duration(mean * (self._total - self._step))))
        if self._phase:
            found.append((6, "now", self._phase))
        return found

    def _render(self) -> Table:
        width = self._console.width - 2
        line = fit(self._fields(), width)
        if self._utf8 and line.cell_len + _BARS_WIDTH + 2 <= width and len(self._rewards) > 1:
            line.append("  " + sparkline(self._rewards), style="green")
        grid = Table.grid(padding=(0, 1))
        grid.add_row(self._spinner, line)
        return grid


def fit(fields: Sequence[tuple[int, str, str]], width: int) -> Text:
    """The fields on one line of at most `width` columns."""
    fields = list(fields)
    while True:
        line = Text("  ").join(
            Text.assemble((f"{label} ", "dim"), (value, "bold" if label == "reward" else ""))
            for _, label, value in fields
        )
        if line.cell_len <= width or len(fields) == 1:
            line.truncate(width)
            return line
        fields.remove(max(fields))


def sparkline(values: Sequence[float]) -> str:
    """One bar a value, between their minimum and their maximum."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in values)


def duration(seconds: float) -> str:
    """90 -> 1:30, 3700 -> 1:01:40."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
