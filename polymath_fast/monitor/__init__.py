"""What a run records and shows.

metrics.jsonl and completions.jsonl in the run folder always; wandb, trackio and TensorBoard by
name; a live line on a terminal and plain lines anywhere else. Only a disk that refuses
metrics.jsonl can stop a run from here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from polymath_fast.errors import UserError
from polymath_fast.folders import run_data
from polymath_fast.folders.run_folder import evaluate_command, resume_command
from polymath_fast.monitor import console as view
from polymath_fast.monitor.status import Status
from polymath_fast.monitor.trackers import Tracker


class Monitor:
    """Records a run of `total_steps` steps in `run_dir`, which must exist.

    `config` is the run's Config (its `log_completions_every` is read, all of it goes to the
    trackers). `start_step` is the step that the run resumed from: later rows of both files are cut.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Any,
        total_steps: int,
        *,
        trackers: Sequence[str] = (),
        console: Console | None = None,
        start_step: int = 0,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.total_steps = total_steps
        self.non_finite = 0
        self._said: set[str] = set()
        self._every = config.log_completions_every
        self._console = console or view.make_console()
        settings = dataclasses.asdict(config)
        self._trackers = [Tracker(name, self.run_dir, settings, self.note) for name in trackers]
        cut = {name: run_data.cut(self.run_dir / name, start_step) for name in _FILES}
        self._files = {name: _open(self.run_dir / name) for name in _FILES}
        for name, (lines, lost) in cut.items():
            if lines:
                self.note(f"{name}: {lines} rows past step {start_step} cut, they will be redone")
            if lost:
                self.note(f"{name}: {lost}; nothing brings them back, the weights are whole")
        self._step = start_step
        self._status = Status(self._console, start_step, total_steps)

    def plan(self, facts: Mapping[str, Any]) -> None:
        """Show what is about to happen: model, sample, engine, devices, steps."""
        self._console.print(view.panel("polymath_fast", facts))

    def note(self, text: str) -> None:
        """Show one line of text, escaped. Any thread may call it."""
        self._console.print(Text(view.printable(text)), soft_wrap=True)

    def note_once(self, where: str, text: str) -> None:
        """`note`, unless this process said `text` before."""
        if text not in self._said:
            self._said.add(text)
            self.note(f"{where}: {text}; said once")

    def phase(self, name: str) -> None:
        """Say what the run is doing now ("generate", "learn", ...); shown on the live line only."""
        self._status.phase(name)

    def log_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one row of numbers or 0-d tensors; NaN and Inf become null and are counted in
        `monitor/non_finite`. A step may have several rows, such as one of an evaluation."""
        numbers = {key: float(value) for key, value in metrics.items()}
        finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
        lost = [key for key in numbers if key not in finite]
        if lost:
            if not self.non_finite:
                self.note(f"warning: not finite at step {step}: {', '.join(lost)}")
            self.non_finite += len(lost)
            finite["monitor/non_finite"] = float(len(lost))
        row = {"step": int(step), **dict.fromkeys(lost), **finite}
        self._append(run_data.METRICS, [row])
        for tracker in self._trackers:
            tracker.log(int(step), finite)
        self._show_step(row)

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append completions (step, group, index, prompt, answer, completion, reward, rewards by
        name, length, finish_reason, weight_version; weight_versions when there are several) and
        show some every `log_completions_every` steps."""
        self._append(run_data.COMPLETIONS, [{**_finite(row), "step": int(step)} for row in rows])
        if rows and self._every > 0 and (step == 1 or step % self._every == 0):
            self._console.print(view.completions_table(step, pick(rows, seed=step)))

    def summary(
        self,
        *,
        checkpoint: Path | None,
        report: Path | None,
        interrupted: bool = False,
    ) -> None:
        """Show the last screen; figures come from metrics.jsonl, also those before a resume."""
        self._status.stop()
        rows = run_data.metrics(self.run_dir)
        facts: dict[str, Any] = {"steps": f"{self._step} of {self.total_steps}"}
        if change := run_data.reward_change(rows):
            first, last, window = change
            steps = f"mean of the last {window} steps" if window > 1 else "last step"
            facts["reward"] = f"{first:.3f} -> {last:.3f} ({steps})"
        for name, scores in run_data.held_out(rows).items():
            facts[f"held-out {name}"] = _before_after(scores)
        if skipped := sum(bool(row.get("update/skipped")) for row in rows):
            facts["no update"] = f"{skipped} steps had nothing to learn from"
        if self.non_finite:
            facts["not finite"] = f"{self.non_finite} metric value(s), written as null"
        facts["model"] = checkpoint or "no checkpoint was saved"
        facts["report"] = report or "not written"
        facts["metrics"] = self.run_dir / run_data.METRICS
        self._console.print(view.panel("interrupted" if interrupted else "done", facts))
        # Commands stand outside of the panel, on one line each, so that they can be copied.
        if self._step < self.total_steps or interrupted:
            self.note(f"go on with:  {resume_command(self.run_dir)}")
        elif checkpoint is not None:
            self.note(f"try it:  {evaluate_command(checkpoint)}")

    def sync(self) -> None:
        """Have the rows on the disk, before a checkpoint says that their steps are done."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def close(self) -> None:
        """Give the terminal back, close the files, let the trackers finish."""
        self._status.stop()
        for file in self._files.values():
            file.close()
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        file = self._files[name]
        try:
            file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
            file.flush()
        except OSError as error:
            raise UserError(
                f"{self.run_dir / name} cannot be written ({error.strerror}); make room, then go "
                f"on with: {resume_command(self.run_dir)}"
            ) from error

    def _show_step(self, row: dict[str, Any]) -> None:
        for name, scores in run_data.held_out([row]).items():
            self.note(f"step {row['step']}  held-out {name} {scores[0]}")
        if row.get("reward/mean") is None:
            return
        self._step = row["step"]
        self._status.show(row)


def pick(rows: Sequence[Mapping[str, Any]], *, seed: int) -> dict[str, Mapping[str, Any]]:
    """Best, worst and one other random completion; excluded ones count only when all are."""
    scored = [row for row in rows if row.get("reward") is not None] or list(rows)
    ordered = sorted(scored, key=lambda row: row.get("reward") or 0.0)
    picks = {"best": ordered[-1], "worst": ordered[0]}
    if len(ordered) > 2:
        picks["random"] = random.Random(seed).choice(ordered[1:-1])
    return picks


def peak_memory_gib() -> float:
    """Peak memory in GiB: what torch reserved on the CUDA device, or else the most RAM that this
    process (not its workers) had resident."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        # Linux carries ru_maxrss over from the parent across exec; VmHWM is this process's own.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


_FILES = (run_data.METRICS, run_data.COMPLETIONS)


def _finite(value: Any) -> Any:
    """`value` with NaN and Inf replaced by None, which is how JSON can say it."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _before_after(scores: list[run_data.Accuracy]) -> str:
    if len(scores) == 1:
        return str(scores[0])
    return f"before {scores[0]}\nafter  {scores[-1]}"


def _open(path: Path) -> TextIO:
    try:
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from error
