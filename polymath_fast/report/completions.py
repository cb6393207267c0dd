"""Chooses the completions that a report shows: a bounded number of steps, three of each."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polymath_fast.folders import run_data

MAX_STEPS = 40
MAX_PROMPTS = 4
# The monitor writes `step` as a number; in a completion's text the quotes would be escaped.
_STEP = re.compile(rb'"step": ?(\d+)')


@dataclass
class StepPicks:
    """What is kept of one step while its completions stream by."""

    step: int
    best: dict[str, Any] | None = None
    worst: dict[str, Any] | None = None
    any: dict[str, Any] | None = None
    count: int = 0

    def add(self, row: dict[str, Any], draw: random.Random) -> None:
        """Take one more completion of the step into account."""
        self.count += 1
        if draw.randrange(self.count) == 0:
            self.any = row
        reward = run_data.number(row.get("reward"))
        if reward is None:
            return
        if self.best is None or reward > self.best["reward"]:
            self.best = row
        if self.worst is None or reward < self.worst["reward"]:
            self.worst = row


@dataclass
class Completions:
    """The completions of a report."""

    steps: list[StepPicks] = field(default_factory=list)
    prompts: list[tuple[str, str | None]] = field(default_factory=list)
    """distinct (prompt, answer or None) pairs in the order they were seen, at most MAX_PROMPTS"""


def choose(run_dir: Path, rows: list[dict[str, Any]]) -> Completions:
    """Best, worst and one random completion of at most MAX_STEPS steps, first and last included.

    Reads completions.jsonl once and keeps a few rows, whatever its size.
    """
    wanted = spread([row["step"] for row in rows if "reward/mean" in row], MAX_STEPS)
    picks = {step: StepPicks(step) for step in wanted}
    prompts: dict[tuple[str, str | None], None] = {}
    draw = random.Random(0)
    path = run_dir / run_data.COMPLETIONS
    if not path.is_file():
        return Completions()
    with path.open("rb") as file:
        for line in file:
            # Most lines belong to steps that are not shown: do not parse them.
            step = _STEP.search(line)
            if step is None or int(step[1]) not in picks:
                continue
            row = run_data.parse_row(line)
            if row is None or row["step"] not in picks:
                continue
            picks[row["step"]].add(row, draw)
            if len(prompts) < MAX_PROMPTS and isinstance(row.get("prompt"), str):
                answer = row.get("answer")
                prompts[row["prompt"], None if answer is None else str(answer)] = None
    shown = [pick for pick in picks.values() if pick.count]
    return Completions(steps=shown, prompts=list(prompts))


def spread(items: list[int], count: int) -> list[int]:
    """At most `count` of `items`, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return items
    last = len(items) - 1
    return [items[round(index * last / (count - 1))] for index in range(count)]
