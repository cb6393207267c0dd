"""Reads a run folder's metrics.jsonl and completions.jsonl, of a run in progress as well, and cuts
them where a run goes on.

The summary on the console and the report both take their figures from here, so they agree, also
after a resume.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymath_fast.folders import kinds

METRICS = "metrics.jsonl"
COMPLETIONS = "completions.jsonl"
_INTERVAL = ("low", "high", "correct", "completions")


@dataclass(frozen=True)
class Accuracy:
    """Held-out accuracy at one step: the mean over all completions with its 95 % interval."""

    step: int
    mean: float
    low: float
    high: float
    correct: int
    total: int

    def __str__(self) -> str:
        interval = f"95 % interval {self.low:.1%} to {self.high:.1%}"
        return f"{self.mean:.1%} ({self.correct}/{self.total}, {interval})"


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line, that have an integer `step`. Lines that are not, such
    as the last one of a run that is being written or was killed, are left out."""
    if not kinds.is_file(path):
        return
    with path.open("rb") as file:
        for line in file:
            row = parse_row(line)
            if row is not None:
                yield row


def parse_row(line: bytes) -> dict[str, Any] | None:
    """One line as an object with an integer `step`, or None."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    usable = isinstance(row, dict) and type(row.get("step")) is int
    return row if usable else None


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """One row per step in ascending order; values of a step's later lines win."""
    merged: dict[int, dict[str, Any]] = {}
    for row in read_rows(Path(run_dir) / METRICS):
        merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


def evaluated(run_dir: Path, step: int) -> bool:
    """Whether an evaluation of `step` is recorded."""
    rows = read_rows(Path(run_dir) / METRICS)
    return any(row["step"] == step and any(k.startswith("eval/") for k in row) for row in rows)


def series(rows: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of every row where `key` is a finite number."""
    found = ((row["step"], number(row.get(key))) for row in rows)
    return [(step, value) for step, value in found if value is not None]


def number(value: Any) -> float | None:
    """`value` as a finite float, or None; also None when it is too large to compute with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= 1e150 else None


def reward_change(rows: list[dict[str, Any]]) -> tuple[float, float, int] | None:
    """Mean reward of the first step, mean of the last steps, and how many steps that is (at most 5,
    at most half of the run); None before the second step."""
    rewards = [value for _, value in series(rows, "reward/mean")]
    if len(rewards) < 2:
        return None
    window = min(5, len(rewards) // 2)
    return rewards[0], sum(rewards[-window:]) / window, window


def held_out(rows: list[dict[str, Any]]) -> dict[str, list[Accuracy]]:
    """Accuracies per evaluated file, oldest first, from the keys eval/<name>/mean@k and
    eval/<name>/{low,high,correct,completions}."""
    found: dict[str, list[Accuracy]] = {}
    for row in rows:
        for key in row:
            prefix, _, last = key.rpartition("/")
            if not (prefix.startswith("eval/") and last.startswith("mean@")):
                continue
            values = [number(row.get(f"{prefix}/{name}")) for name in (last, *_INTERVAL)]
            if None not in values:
                mean, low, high, correct, total = values
                accuracy = Accuracy(row["step"], mean, low, high, int(correct), int(total))
                found.setdefault(prefix.removeprefix("eval/"), []).append(accuracy)
    return found


def is_held_out(key: str) -> bool:
    """Whether `held_out` reads a metric."""
    last = key.rpartition("/")[2]
    return key.startswith("eval/") and (last.startswith("mean@") or last in _INTERVAL)


def cut(path: Path, last_step: int) -> tuple[int, str]:
    """Drop torn rows and rows past `last_step` (all rows when it is 0), at once; returns how many
    will be written anew, and what of the steps up to it is lost, or ""."""
    if not kinds.exists(path):
        return 0, ""
    temporary = path.with_name(path.name + ".tmp")
    dropped, torn, step = 0, 0, 0
    kept: set[int] = set()
    with path.open("rb") as source, temporary.open("wb") as target:
        for line in source:
            row = parse_row(line) if line.endswith(b"\n") else None
            step = step if row is None else row["step"]
            if row is not None and step <= last_step and last_step > 0:
                target.write(line)
                kept.add(step)
            elif row is None and step < last_step:
                torn += 1
            else:
                dropped += 1
        target.flush()
        os.fsync(target.fileno())
    temporary.replace(path)
    # a run that went on from another one's checkpoint has no rows of the steps before
    missing = sorted(set(range(min(kept, default=last_step + 1), last_step + 1)) - kept)
    lost = [f"torn rows: {torn}"] if torn else []
    if missing:
        more = ", ..." if len(missing) > 3 else ""
        lost.append(f"steps without rows: {', '.join(map(str, missing[:3]))}{more}")
    return dropped, ", ".join(lost)
