"""Small runs in this process, whose reward may fall asleep."""

from __future__ import annotations

from pathlib import Path

from polymath_fast import train

REWARD = '''
import time
from pathlib import Path

calls = 0


def even(prompts, completions, completion_ids, **columns):
    """Share of even token ids, which differs from the start."""
    global calls
    calls += 1
    if calls == SLEEPS_AT:
        Path(__file__).with_name("asleep").touch()
        time.sleep(600)
    return [sum(i % 2 == 0 for i in ids) / max(1, len(ids)) for ids in completion_ids]
'''


def make_flags(folder: Path, sleeps_at: int = 0) -> list[str]:
    """Flags of a small run whose reward falls asleep in its call number `sleeps_at`."""
    (folder / "my_reward.py").write_text(f"SLEEPS_AT = {sleeps_at}\n{REWARD}")
    return [
        *("--model", "random:tiny", "--question", "Say something.", "--answer", "e"),
        *("--engine", "transformers", "--reward", f"{folder / 'my_reward.py'}:even"),
        *("--num-generations", "8", "--groups-per-step", "1", "--max-completion-length", "16"),
        *("--learning-rate", "0.01", "--max-steps", "5", "--save-every", "2"),
    ]


def run(flags: list[str], folder: Path) -> int:
    return train.main([*flags, "--output-dir", str(folder)])
