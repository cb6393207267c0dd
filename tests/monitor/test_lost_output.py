"""A run whose output is closed, full, gone or of another encoding goes on to its end."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest
from monitored import lines

_RUN = """
import dataclasses, sys
from pathlib import Path
from polymath_fast.monitor import Monitor
@dataclasses.dataclass
class Settings: log_completions_every: int = 1
with Monitor(Path(sys.argv[1]), Settings(), 300) as monitor:
    monitor.plan({"model": "tiny"})
    for step in range(1, 301):
        monitor.phase("generate")
        monitor.log_step(step, {"reward/mean": 0.5})
        monitor.log_completions(step, [{"completion": "x" * 400, "reward": 1.0, "length": 9}])
    monitor.summary(checkpoint=None, report=None)
print("a library's own print", flush=True)
sys.exit(7)
"""


@pytest.mark.parametrize(
    "shell",
    [
        'exec "$0" -c "$1" "$2" >&-',
        '"$0" -c "$1" "$2" | head -1',
        'exec "$0" -c "$1" "$2" >/dev/full',
    ],
    ids=["closed", "broken pipe", "full"],
)
def test_run_survives_its_output(tmp_path, shell):
    script = "set -o pipefail\n" + shell
    result = subprocess.run(
        ["bash", "-c", script, sys.executable, _RUN, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (7, "")
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == list(range(1, 301))
    assert len(lines(tmp_path / "completions.jsonl")) == 300


def test_run_survives_a_terminal_that_goes_away(tmp_path):
    """The terminal hangs up in the middle of the run, while the live line is being drawn."""
    leader, follower = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(tmp_path)],
        stdout=follower,
        stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(follower)
    assert os.read(leader, 100)
    os.close(leader)
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (7, b"")
    assert len(lines(tmp_path / "metrics.jsonl")) == 300


def test_output_that_cannot_encode(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", _RUN.replace('"tiny"', '"\\u4f60"'), str(tmp_path)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (7, b"")
    assert b"step 300/300" in result.stdout
