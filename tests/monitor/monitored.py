"""A monitor of a run that never was, with its output in memory."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

from rich.console import Console

from polymath_fast.monitor import Monitor


@dataclasses.dataclass
class Settings:
    log_completions_every: int = 5
    learning_rate: float = 5e-5


METRICS = {
    "reward/mean": 0.25,
    "completion/mean_length": 62.0,
    "throughput/completion_tokens_per_s": 480.0,
    "memory/peak_gib": 1.875,
    "time/step": 12.0,
}
HOSTILE = (
    "ok\x1b[2J\x1b]0;title\x07 \r gone [bold]not markup[/] [/] \u202eabc \ud800 \x9b31m\n\\boxed{5}"
)


def completion(step: int, index: int, reward: float | None, text: str = "four") -> dict:
    return {
        **{"step": step, "group": 0, "index": index, "prompt": "2+2?", "completion": text},
        **{"reward": reward, "rewards": {"math": reward}, "length": 3, "finish_reason": "stop"},
        "weight_version": step - 1,
    }


def monitor(run_dir: Path, total: int = 10, **options) -> tuple[Monitor, io.StringIO]:
    output = io.StringIO()
    options.setdefault("console", Console(file=output, width=80, highlight=False))
    return Monitor(run_dir, Settings(), total, **options), output


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
