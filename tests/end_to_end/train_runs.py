"""Small runs of `python -m polymath_fast.train`: their flags, their command, their metrics."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from polymath_fast import train

REWARD = '''
def vowels(prompts, completions, completion_ids, **columns):
    """Share of the letter e in the text: any model can learn it."""
    return [text.count("e") / max(1, len(ids)) for text, ids in zip(completions, completion_ids)]


def even(prompts, completions, completion_ids, **columns):
    """Share of even token ids, which differs from the start."""
    return [sum(i % 2 == 0 for i in ids) / max(1, len(ids)) for ids in completion_ids]
'''


def make_flags(folder):
    (folder / "my_reward.py").write_text(REWARD)
    return [
        *("--model", "random:tiny", "--question", "Say something.", "--answer", "e"),
        *("--engine", "transformers", "--reward", f"{folder / 'my_reward.py'}:vowels"),
        *("--num-generations", "16", "--groups-per-step", "2", "--max-completion-length", "24"),
        *("--learning-rate", "0.01", "--max-steps", "10", "--save-every", "5"),
    ]


def command(flags, output_dir):
    words = [sys.executable, "-m", "polymath_fast.train", *flags, "--output-dir", str(output_dir)]
    return [str(word) for word in words]


def run(flags, output_dir, expect=0):
    done = subprocess.run(command(flags, output_dir), capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def run_here(flags, output_dir, expect=0):
    """In this process, where the test is not about one that starts or ends."""
    assert train.main(command(flags, output_dir)[3:]) == expect


def metrics(output_dir):
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
