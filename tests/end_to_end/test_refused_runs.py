"""Dry runs, and runs that are refused: what they say, and that nothing is written."""

from __future__ import annotations

import os
import re
import subprocess
import time

import pytest
from train_runs import command, run, run_here

from polymath_fast import machine
from polymath_fast.run import dry_run


def test_dry_run_prints_the_plan_and_writes_nothing(flags, tmp_path, capsys):
    run_here([*flags, "--dry-run"], tmp_path / "run")
    said = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    for word in ("random:tiny", "transformers", "gold", "wrong", "GiB"):
        assert word in said


@pytest.mark.parametrize("processes", [1, 2])
def test_a_dry_run_that_finds_too_little_memory_names_what_would_do(
    tmp_path, capsys, monkeypatch, processes
):
    """A tape of 4 GiB for each process, and 1.5 GiB free for each."""
    monkeypatch.setattr(dry_run, "_free_gib", lambda device: 1.5 * processes)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    words = ["--model", "random:tiny", "--question", "1+1?", "--answer", "2", "--dry-run"]
    words += ["--num-generations", "200000", "--max-completion-length", "512", "--tape-gib", "4"]
    run_here([*words, "--num-processes", str(processes)], tmp_path / "run", expect=2)
    said = capsys.readouterr().err
    assert f"{1.5 * processes:.1f} GiB are free; --tape-gib 0 works" in said
    assert ("2 times weights" in said) == (processes == 2)


def test_a_dry_run_counts_a_part_of_the_optimizer_and_names_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 2)
    words = ["--model", "embedded:smollm2", "--question", "1+1?", "--answer", "2", "--dry-run"]
    words += ["--num-processes", "2", "--num-generations", "4", "--groups-per-step", "1"]
    words += ["--max-completion-length", "64", "--tape-gib", "0", "--gradient-checkpointing"]
    needed = {}
    for more in ([], ["--shard-optimizer"]):
        monkeypatch.setattr(dry_run, "_free_gib", lambda device: 1000.0)
        run_here([*words, *more], tmp_path / "run")
        said = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert ("of every group and of the optimizer's state" in said) == bool(more)
        needed[bool(more)] = float(re.search(r"about ([\d.]+) GiB of", said)[1])
    assert needed[False] - needed[True] > 1
    monkeypatch.setattr(dry_run, "_free_gib", lambda device: needed[True] + 0.1)
    run_here(words, tmp_path / "run", expect=2)
    assert "GiB are free; --shard-optimizer works" in capsys.readouterr().err
    run_here([*words, "--shard-optimizer"], tmp_path / "run")
    monkeypatch.setattr(dry_run, "_free_gib", lambda device: needed[True] - 0.5)
    run_here(words, tmp_path / "run", expect=2)
    assert "GiB are free; --offload-optimizer works" in capsys.readouterr().err
    run_here([*words, "--offload-optimizer"], tmp_path / "run")


def test_a_dry_run_refuses_a_reward_that_prefers_wrong_answers(tmp_path, capsys):
    words = ["--model", "random:tiny", "--question", "1+1?", "--answer", "2", "--dry-run"]
    run_here([*words, "--reward-weights", "-1"], tmp_path / "run", expect=2)
    said = capsys.readouterr().err
    assert "the reward gives -1.0 to the right answer" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("answer", "more", "said"),
    [
        ("yes", [], True),
        ("yes", ["--instruction", r"Write \boxed{yes} or \boxed{no}."], False),
        ("-3/4 cm", [], False),
    ],
)
def test_an_answer_that_needs_a_box_is_told(tmp_path, capsys, answer, more, said):
    """The preset of the embedded model asks for none."""
    words = ["--model", "random:tiny", "--config", "cpu_demo", "--question", "what?", "--dry-run"]
    run_here([*words, "--answer", answer, *more], tmp_path / "run")
    assert ("asks for no \\boxed{}" in capsys.readouterr().out) == said


@pytest.mark.parametrize(("updates", "said"), [("1", True), ("2", False)])
def test_bounds_that_change_nothing_are_told(tmp_path, capsys, updates, said):
    words = ["--model", "random:tiny", "--question", "1+1?", "--answer", "2", "--dry-run"]
    words += ["--updates-per-batch", updates, "--epsilon-high", "0.28"]
    run_here(words, tmp_path / "run")
    assert ("--epsilon-high will change nothing" in capsys.readouterr().out) == said


def test_a_prompt_may_fill_a_microbatch(tmp_path):
    words = ["--model", "random:tiny", "--question", "why? " * 30, "--answer", "2", "--dry-run"]
    words += ["--max-completion-length", "32", "--tokens-per-microbatch", "32"]
    run_here(words, tmp_path / "run")


def test_a_dry_run_measures_the_right_answer_in_tokens(tmp_path, capsys):
    """96 of them are allowed; the answer has more bytes than that, and half as many tokens."""
    answer = (
        r"\begin{pmatrix} \text{multiplication} & \text{multiplication} \end{pmatrix}" + " " * 30
    )
    words = ["--question", "what?", "--answer", answer + "and addition", "--dry-run"]
    run_here([*words, "--reward", "math", "length"], tmp_path / "run")
    assert "-> 1.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--tokens-per-microbatch", "20"], "-microbatch is 20; one completion must fit"),
        (["--max-completion-length", "4000"], "--max-completion-length"),
        (["--device", "cuda"], "--device cuda"),
        (["--reuse-kv-cache"], "the embedded sampler keeps nothing"),
        (["--tape-gib", "1", "--updates-per-batch", "2"], "--updates-per-batch 2 on the weights"),
        (["--tape-gib", "1", "--model", "random:tiny-gemma"], "does not decode gemma models"),
        (["--tape-gib", "1", "--beta", "0.1"], "compares log-probs with a reference model's"),
        (["--tape-gib", "1e-9"], "1e-09, which is less than one token takes; 1 works"),
        (["--eval-dataset", "missing.jsonl"], "missing.jsonl"),
        (["--resume", "nowhere"], "--resume nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, tmp_path, extra, message, capsys):
    if "cuda" in extra and os.environ.get("CUDA_VISIBLE_DEVICES", "x") != "":
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a CUDA device")
    if "nowhere" in extra:  # one of them as a user runs it
        done = run([*flags, *extra], tmp_path / "run", expect=2)
        assert message in done.stderr and "Traceback" not in done.stderr
    else:
        run_here([*flags, *extra], tmp_path / "run", expect=2)
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


def test_two_runs_in_one_folder(flags, tmp_path, capsys):
    process = subprocess.Popen(
        command([*flags, "--max-steps", "100000"], tmp_path / "run"), stdout=subprocess.DEVNULL
    )
    try:
        path = tmp_path / "run/metrics.jsonl"
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.05)
        run_here([*flags, "--resume", "auto"], tmp_path / "run", expect=2)
        assert f"pid {process.pid}" in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()
