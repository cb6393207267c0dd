"""A folder that holds a run, and flags of a small one."""

from __future__ import annotations

from pathlib import Path

from polymath_fast.folders.run_folder import LOCK_FILE


def earlier_run(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / LOCK_FILE).touch()
    (path / "config.toml").write_text("seed = 0\n")
    (path / "metrics.jsonl").write_text('{"step": 1}\n')
    return path


FLAGS = [
    *("--model", "random:tiny", "--question", "Say something.", "--answer", "e"),
    *("--engine", "transformers", "--num-generations", "2", "--groups-per-step", "1"),
    *("--max-completion-length", "4", "--max-steps", "1"),
]
