"""Runs that end before their time: what they say, what they leave, and how they go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from polymath_fast import checkpoint, report, train
from polymath_fast.errors import EngineError, UserError
from polymath_fast.kernels import linear_grpo_loss
from polymath_fast.learner import loss as learner_loss
from polymath_fast.monitor import Monitor
from polymath_fast.ranks import Ranks
from polymath_fast.rewards import RewardSet
from polymath_fast.rollout.transformers_engine import TransformersEngine
from polymath_fast.rollout.weights import IdentitySync
from polymath_fast.run import resuming, saving

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


@pytest.fixture
def flags(tmp_path):
    return make_flags(tmp_path)


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


def newest(folder: Path) -> checkpoint.Checkpoint:
    def torn(path: Path, reason: str) -> None:
        raise AssertionError(f"{path}: {reason}")

    return resuming.find(folder, on_skip=torn)


def assert_same_end(one: Path, two: Path) -> None:
    """Weights, optimizer and completions of both runs are equal, bit for bit."""
    left, right = newest(one), newest(two)
    assert (left.step, left.state["updates"]) == (right.step, right.state["updates"])
    theirs = right.tensors()
    for name, tensor in left.tensors().items():
        assert torch.equal(tensor, theirs[name]), name
    for name in ("metrics.jsonl", "completions.jsonl"):
        assert (one / name).read_text().count("\n") == (two / name).read_text().count("\n")
    assert (one / "completions.jsonl").read_bytes() == (two / "completions.jsonl").read_bytes()


GONE = EngineError("the engine is gone")


def failing(
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    call: int,
    error: Exception = GONE,
) -> None:
    """Let the method fail in its call number `call`, and count on."""
    method, calls = getattr(owner, name), []

    def fails(self, *arguments):
        calls.append(name)
        if len(calls) == call:
            raise error
        return method(self, *arguments)

    monkeypatch.setattr(owner, name, fails)


def test_a_step_whose_weights_did_not_reach_the_engine_is_done_all_the_same(
    flags, tmp_path, monkeypatch, capsys
):
    assert run(flags, tmp_path / "straight") == 0
    for method, call in (("push", 3), ("verify", 4)):  # it is verified once before the first step
        folder = tmp_path / method
        with monkeypatch.context() as patch:
            failing(patch, IdentitySync, method, call)
            assert run([*flags, "--verify-sync"], folder) == 1
        assert "the engine is gone" in capsys.readouterr().err
        found = newest(folder)
        assert (found.step, found.state["updates"]) == (3, 3)
        assert run([*flags, "--resume", "auto"], folder) == 0
        assert_same_end(tmp_path / "straight", folder)


def test_what_a_step_left_pending_is_saved_with_it(flags, tmp_path, monkeypatch):
    flags += ["--oversample", "3", "--partial-rollouts", "--temperature", "0.3"]
    flags += ["--importance-sampling-mode", "token_truncate", "--stop-repetition", "2"]
    assert run(flags, tmp_path / "straight") == 0
    with monkeypatch.context() as patch:
        failing(patch, IdentitySync, "push", 2)
        assert run(flags, tmp_path / "broken") == 1
    assert newest(tmp_path / "broken").state["pending"]
    assert run([*flags, "--resume", "auto"], tmp_path / "broken") == 0
    assert_same_end(tmp_path / "straight", tmp_path / "broken")


def test_a_step_whose_row_cannot_be_written_leaves_no_drafts(flags, tmp_path, monkeypatch):
    """All rewards are equal, so no update tells that the step was begun."""
    reward = tmp_path / "equal.py"
    reward.write_text("def equal(completions, **_):\n    return [1.0] * len(completions)\n")
    flags += ["--reward", f"{reward}:equal", "--speculate", "4"]
    assert run(flags, tmp_path / "straight") == 0
    for method in ("log_step", "log_completions"):
        folder = tmp_path / method
        with monkeypatch.context() as patch:
            failing(patch, Monitor, method, 4, UserError("no room"))
            assert run(flags, folder) == 2
        assert newest(folder).step == 3
        assert run([*flags, "--resume", "auto"], folder) == 0
        assert_same_end(tmp_path / "straight", folder)


def test_an_engine_that_dies_while_sampling_leaves_the_last_whole_step(
    flags, tmp_path, monkeypatch
):
    assert run(flags, tmp_path / "straight") == 0
    for call, step in ((4, 3), (3, 2)):  # before and after a regular save
        folder = tmp_path / str(step)
        with monkeypatch.context() as patch:
            failing(patch, TransformersEngine, "stream", call)
            assert run(flags, folder) == 1
        assert newest(folder).step == step
        assert run([*flags, "--resume", "auto"], folder) == 0
        assert_same_end(tmp_path / "straight", folder)


@pytest.mark.parametrize(("call", "steps"), [(4, 2), (7, 5)])
def test_a_process_that_is_gone_when_they_ask_whether_to_stop_costs_no_step(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, steps: int
) -> None:
    """Before a step, and after the last one."""
    failing(monkeypatch, Ranks, "any", call)
    assert run([*flags, "--save-every", "0"], tmp_path / "run") == 1
    assert newest(tmp_path / "run").step == steps


def test_a_reward_that_cannot_go_on_leaves_the_last_whole_step(flags, tmp_path, monkeypatch):
    assert run(flags, tmp_path / "straight") == 0
    with monkeypatch.context() as patch:
        failing(patch, RewardSet, "score", 4, UserError("--reward: broken"))
        assert run(flags, tmp_path / "broken") == 2
    assert newest(tmp_path / "broken").step == 3
    assert run([*flags, "--resume", "auto"], tmp_path / "broken") == 0
    assert_same_end(tmp_path / "straight", tmp_path / "broken")


def test_a_rescue_that_fails_does_not_hide_why_it_was_called(flags, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        failing(patch, TransformersEngine, "stream", 4)
        patch.setattr(checkpoint, "save", full_disk)
        patch.setattr(train, "save", lambda *_: None)  # the regular one of step 2
        assert run(flags, tmp_path / "run") == 1
    said = capsys.readouterr()
    assert "the engine is gone" in said.err and "not saved: no room" in said.out


def full_disk(*_, **__):
    raise UserError("no room")


def test_half_of_a_step_is_not_saved_under_the_name_of_another(
    flags, tmp_path, monkeypatch, capsys
):
    """Two updates a step; memory ends in the second one of step 4."""
    flags += ["--updates-per-batch", "2"]
    assert run(flags, tmp_path / "straight") == 0
    calls = []

    def loss(*arguments, **options):
        calls.append("loss")
        if len(calls) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return linear_grpo_loss(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(learner_loss, "linear_grpo_loss", loss)
        assert run(flags, tmp_path / "broken") == 2
    said = capsys.readouterr()
    assert "out of memory" in said.err
    assert "step 4 broke off between two of its updates" in said.out
    assert newest(tmp_path / "broken").step == 2
    assert run([*flags, "--resume", "auto"], tmp_path / "broken") == 0
    assert_same_end(tmp_path / "straight", tmp_path / "broken")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), UserError("no room"), KeyError("reward")]
)
def test_a_report_that_fails_does_not_fail_a_run_that_is_saved(
    flags, tmp_path, monkeypatch, capsys, error
):
    def fails(_):
        raise error

    monkeypatch.setattr(report, "write_report", fails)
    folder = tmp_path / "my run"
    assert run([*flags, "--max-steps", "1"], folder) == 0
    said = capsys.readouterr().out
    assert "the report was not written" in said and str(error) in said
    assert f" -m polymath_fast.report '{folder}'" in said
    assert newest(folder).step == 1


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
