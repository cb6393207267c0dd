"""Runs that a signal ends: when it is heard, what is said, what is left, and how they go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from endings import assert_same_end, newest
from stopped_runs import make_flags, run

from polymath_fast import train
from polymath_fast.rollout.transformers_engine import TransformersEngine
from polymath_fast.run import saving


def children_of(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for each in lists for child in each.read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start(flags: list[str], folder: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "polymath_fast.train", *flags, "--output-dir", str(folder)]
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background would hand an ignored SIGINT down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("sleeps_at", "saved"), [(1, "nothing was saved yet"), (4, "step_000002 was saved last")]
)
def test_a_second_signal_stops_with_one_plain_line_and_no_child(tmp_path, sleeps_at, saved):
    process = start(make_flags(tmp_path, sleeps_at), tmp_path / "run")
    wait_for(tmp_path / "asleep", process)
    children = children_of(process.pid)
    assert children
    process.send_signal(signal.SIGINT)
    lines = [process.stderr.readline() for _ in range(2)]
    assert "once more stops at once" in "".join(lines)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = errors.splitlines()
    assert line.startswith("stopped at once; ") and saved in line
    assert "--resume auto" in line and str(tmp_path / "run") in line
    deadline = time.monotonic() + 20
    while any(map(alive, children)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not [path for path in tmp_path.glob("run/checkpoints/*") if "tmp" in path.name]


@pytest.mark.vllm
@pytest.mark.slow
def test_a_second_signal_ends_an_engine_in_another_process(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # vLLM's short warm-up
    flags = [*make_flags(tmp_path, 3), "--engine", "vllm", "--weight-sync", "ipc"]
    process = start(flags, tmp_path / "run")
    wait_for(tmp_path / "asleep", process)
    children = children_of(process.pid)
    assert len(children) >= 2  # the reward's and the engine's
    os.kill(process.pid, signal.SIGINT)
    while "once more" not in process.stderr.readline():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "step_000002 was saved last" in errors.splitlines()[-1]
    assert not any(map(alive, children))


@pytest.mark.parametrize(("at", "steps"), [(0, 0), (2, 2), (5, 5)])
def test_a_signal_during_an_evaluation_costs_no_further_step(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, steps: int
) -> None:
    """Neither one before the first step, nor one between two, nor the last one."""

    def evaluate(settings: object, parts: object, step: int) -> None:
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, "evaluate", evaluate)
    code = run([*flags, "--eval-every", "2", "--save-every", "0"], tmp_path / "run")
    assert code == (0 if at == 5 else 130)  # the run that was asked for is done
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == steps
    assert newest(tmp_path / "run").step == steps if steps else newest(tmp_path / "run") is None


def evaluations(folder: Path) -> list[int]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "eval/held_out/mean@1" in row]


@pytest.mark.parametrize("at", [2, 5])
def test_an_evaluation_that_a_signal_kept_from_is_made_up_for(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at: int,
) -> None:
    """So that what is left of a run, and be it its last evaluation alone, equals a straight one."""
    problems = tmp_path / "held_out.jsonl"
    problems.write_text('{"problem": "Say a.", "answer": "e"}\n')
    flags = [*flags, "--eval-dataset", str(problems), "--eval-every", "2"]
    assert run(flags, tmp_path / "straight") == 0
    assert evaluations(tmp_path / "straight") == [0, 2, 4, 5]
    step = train.train_step

    def interrupted(settings: object, parts: object, number: int) -> object:
        if number == at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(settings, parts, number)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        assert run(flags, tmp_path / "run") == 130
    assert evaluations(tmp_path / "run")[-1] < at
    assert "go on with:" in capsys.readouterr().out
    assert run([*flags, "--resume", "auto"], tmp_path / "run") == 0
    assert evaluations(tmp_path / "run") == [0, 2, 4, 5]
    assert "step_000005" in capsys.readouterr().out
    assert_same_end(tmp_path / "run", tmp_path / "straight")
    assert run([*flags, "--resume", "auto"], tmp_path / "run") == 2  # nothing is left now
    assert "--max-steps 15 goes on" in capsys.readouterr().err


def test_a_signal_in_the_last_step_of_a_run_without_evaluations_stops_nothing(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = train.train_step

    def interrupted(settings: object, parts: object, number: int) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return step(settings, parts, number)

    monkeypatch.setattr(train, "train_step", interrupted)
    assert run([*flags, "--max-steps", "1"], tmp_path / "run") == 0
    assert newest(tmp_path / "run").step == 1


def test_a_signal_during_a_save_costs_no_further_step(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        train, "save", lambda *args: (os.kill(os.getpid(), signal.SIGINT), saving.save(*args))[1]
    )
    assert run(flags, tmp_path / "run") == 130
    assert newest(tmp_path / "run").step == 2


def test_a_signal_before_the_first_step_is_no_traceback(flags, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "__init__", interrupted)
        assert run(flags, tmp_path / "run") == 130
    assert capsys.readouterr().err == "stopped before the first step\n"
    assert run([*flags, "--max-steps", "1"], tmp_path / "run") == 0
