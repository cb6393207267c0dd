"""Commands that a run prints to be entered as they are."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from polymath_fast.folders import run_folder


def test_commands_call_the_python_that_runs(tmp_path, monkeypatch):
    """`make setup` makes an environment that nobody has to activate; a bare `python` is another."""
    python = tmp_path / "my venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    commands = (
        lambda: run_folder.resume_command(tmp_path / "run"),
        lambda: run_folder.report_command(tmp_path / "run"),
        lambda: run_folder.evaluate_command(tmp_path / "run"),
    )
    for folder, path, expected in (
        (tmp_path, "", "my venv/bin/python"),
        (tmp_path / "my venv", "", "bin/python"),
        (Path("/"), str(python.parent), "python"),
    ):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PATH", path)
        assert {shlex.split(command())[0] for command in commands} == {expected}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("PATH", "")
    assert shlex.split(commands[0]())[0] == str(python)


@pytest.mark.parametrize("words", [["--instruction", ""], ["--template", "plain"]])
def test_the_command_that_scores_a_checkpoint_asks_as_the_run_did(tmp_path, words, capsys):
    """A policy that was trained on other prompts scores worse on the default ones."""
    from polymath_fast import evaluate, train
    from polymath_fast.samples.prompts import DEFAULT_INSTRUCTION

    common = ["--max-steps", "1", "--num-generations", "2", "--groups-per-step", "1"]
    common += ["--max-completion-length", "4", "--eval-dataset", "--model", "random:tiny"]
    run_dir = tmp_path / "run"
    assert train.main([*common, *words, "--output-dir", str(run_dir)]) == 0
    command = shlex.split(capsys.readouterr().out.partition("try it:")[2].splitlines()[0])
    asked = command[command.index("--model") :]
    cheap = ["--max-problems", "1", "--engine", "transformers", "--device", "cpu"]
    assert evaluate.main([*asked, *cheap, "--output-dir", str(tmp_path / "like")]) == 0
    assert "note: the run" not in capsys.readouterr().out
    plain = [*asked[:2], *cheap, "--max-completion-length", "4"]
    assert evaluate.main([*plain, "--output-dir", str(tmp_path / "unlike")]) == 0
    assert f"asked with {'--template chat ' * (words[0] != '--template')}{shlex.join(words)}, " in (
        capsys.readouterr().out
    )
    ways = []
    for name in ("run", "like", "unlike"):
        row = json.loads((tmp_path / name / "completions.jsonl").read_text().splitlines()[0])
        ways.append((DEFAULT_INSTRUCTION in row["prompt"], "<|im_start|>" in row["prompt"]))
    assert ways[0] == ways[1] != ways[2] == (True, True)


def test_command_for_a_name_that_looks_like_a_flag():
    words = shlex.split(run_folder.resume_command(Path("-dash")))
    assert not {"-dash", "-dash/config.toml"} & set(words)
    assert words[words.index("--output-dir") + 1] == "./-dash"
