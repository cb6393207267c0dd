"""Runs that an engine, a reward, a disk or a lack of memory ends: what is left, how they go on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from endings import assert_same_end, newest
from stopped_runs import run

from polymath_fast import checkpoint, report, train
from polymath_fast.errors import EngineError, UserError
from polymath_fast.kernels import linear_grpo_loss
from polymath_fast.learner import loss as learner_loss
from polymath_fast.learner.step import Learner
from polymath_fast.monitor import Monitor
from polymath_fast.precision import choose_dtype
from polymath_fast.ranks import Ranks
from polymath_fast.rewards import RewardSet
from polymath_fast.rollout.transformers_engine import TransformersEngine
from polymath_fast.rollout.weights import IdentitySync

STATE = "--master-weights remainder or " * (choose_dtype("auto", "cpu")[0] == "bfloat16")
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

    def fails(self, *arguments, **options):
        calls.append(name)
        if len(calls) == call:
            raise error
        return method(self, *arguments, **options)

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


@pytest.mark.parametrize(
    ("owner", "name", "call", "words", "steps"),
    [
        (
            TransformersEngine,
            "stream",
            4,
            "8 completions of at most 16 tokens were sampled; .*--max-completion-length 8",
            3,
        ),
        (Learner, "__init__", 1, f"about to begin .* weights; go on with {STATE}", 0),
    ],
)
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=["torch", "python"]
)
def test_a_lack_of_memory_names_what_to_change(
    flags, tmp_path, monkeypatch, capsys, owner, name, call, words, steps, error
):
    """While sampling and before the first step; `test_out_of_memory` has the learner's."""
    with monkeypatch.context() as patch:
        failing(patch, owner, name, call, error)
        assert run(flags, tmp_path / "run") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(f"out of memory: .*{words}.*--offload-optimizer", said), said
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))[-1:] == (
        [f"step_{steps:06}"] if steps else []
    )


def test_an_engine_without_memory_says_itself_what_to_change(flags, tmp_path, monkeypatch, capsys):
    error = EngineError("can't allocate memory: a smaller --kv-cache-gib works")
    with monkeypatch.context() as patch:
        failing(patch, TransformersEngine, "stream", 1, error)
        assert run(flags, tmp_path / "run") == 1
    assert capsys.readouterr().err.strip() == f"error: {error}"


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
