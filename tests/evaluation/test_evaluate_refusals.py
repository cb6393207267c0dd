"""Evaluations that cannot be: flags, files, prompts and disks; each is one line."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from polymath_fast import evaluate
from polymath_fast.errors import UserError
from polymath_fast.evaluation import result_folder
from polymath_fast.evaluation.problem_files import Grading


def test_a_prompt_too_long_names_what_works_for_all(file_of, scripted, tmp_path, capsys):
    rows = [{"problem": "1" * length, "answer": "2"} for length in (159, 179, 169)]
    flags = ["--dataset", file_of("f", *rows), "--output-dir", str(tmp_path / "out")]
    assert scripted(lambda *_: "2", *flags) == 2
    said = capsys.readouterr().err
    assert "f.jsonl:2" in said and "--max-completion-length 20 works" in said
    assert scripted(lambda *_: "2", *flags, "--max-completion-length", "20") == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--k", "0"], "--k is 0; it must be at least 1"),
        (["--k", "4"], "greedy completions are all the same"),
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--temperature", "0.001"], r"0.001; it must be 0 \(greedy\) or .* 0.6 works"),
        (["--max-completion-length", "0"], "length is 0; it must be at least 1 .*; 1024 works"),
        (["--max-problems", "0"], "--max-problems is 0; it must be at least 1 .*; 1 works"),
        (["--threads", "100000"], "--threads is 100000; it must be .* at most 4096; 4 works"),
        (["--seed", "4294967296"], "--seed is 4294967296; it must be .* 4294967295; 0 works"),
        (["--k", "many"], "--k is 'many'; it must be a whole number; 8 works"),
        (["--temperature", "warm"], "--temperature is 'warm'; it must be a number; 0.6 works"),
        (["--template=plian"], "--template is 'plian'; it must be one of chat, plain, .* works"),
        (["--seed"], "--seed takes one value, but has none; 0 works"),
        (["--model", "https://me:secret@host/m"], "--model seems to hold an access token"),
        (["--kv-cache-gib", "1e300"], "--kv-cache-gib is 1e.300; .* at most 65536"),
        (["--dataset", "{file}", "--dataset-split", "train"], "--dataset-split train is for data"),
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl is not there"),
        (["--dataset", "{file}", "{file}"], "there is a source 'f' already"),
        (["--dataset", "{file}=a/b\tc\n"], r"are called 'a/b\\tc\\n', .*=a_b_c works"),
        (["--dataset", "{file}", "--mcp-sources", "g"], "no source 'g'.*there are f"),
        (["--dataset", "{file}", "--max-completion-length", "199"], "200 positions"),
        (["--result-path", "nowhere.json"], "nowhere.json cannot be read"),
        (["--result-path", "{file}"], "not a result of"),
        (["--result-path", "{file}", "--dataset", "{file}"], "--dataset is for asking a model"),
        (["--result-path", "{file}", "--k", "2", "--temperature", "1"], "--k is for asking"),
        (["--result-path", "{file}", "--model", "random:tiny"], "--model is for asking"),
        (["--device", "cuda", "--dataset", "{file}"], "--device cuda"),
        (
            ["--engine", "transformers", "--kv-cache-gib", "1", "--dataset", "{file}"],
            "--kv-cache-gib 1 is for vLLM",
        ),
    ],
)
def test_bad_flags_are_one_line_and_code_2(
    file_of, scripted, tmp_path, capsys, monkeypatch, flags, said
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = file_of("f", {"problem": "1+1", "answer": "2"})
    flags = [flag.replace("{file}", path) for flag in flags]
    out = tmp_path / "out"
    assert scripted(lambda *_: "2", *flags, "--output-dir", str(out)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert re.search(said, printed)
    assert not out.exists()


def test_sources_that_rows_name_may_hold_anything(file_of, scripted, tmp_path, capsys):
    """As data_source of verl does; --dataset FILE=NAME, which is advised, has to work."""
    row = {"problem": "1", "answer": "2", "data_source": "owner/set"}
    first, second = file_of("f", row), file_of("g", row)
    flags = ["--output-dir", str(tmp_path / "out"), "--dataset", first]
    assert scripted(lambda *_: "2", *flags, second) == 2
    advice = re.search(r"e\.g\. (\S+)", capsys.readouterr().err)[1]
    assert advice == f"{second}=owner_set_2"
    assert scripted(lambda *_: "2", *flags, advice) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert set(result["results"]) == {"owner/set", "owner_set_2"}


def test_a_disk_that_fails_is_one_line(file_of, scripted, tmp_path, capsys, monkeypatch):
    path = file_of("f", {"problem": "1+1", "answer": "2"})
    flags = ["--dataset", path, "--output-dir", str(tmp_path / "out")]

    def full(plain, path, *arguments, **options):
        if "out" in path.parts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(path, *arguments, **options)

    for method in ("open", "write_text"):
        with monkeypatch.context() as patch:
            plain = getattr(Path, method)
            patch.setattr(Path, method, lambda *given, p=plain, **more: full(p, *given, **more))
            assert scripted(lambda *_: "2", *flags) == 2
        assert "cannot be written (No space left on device)" in capsys.readouterr().err
        for left in (tmp_path / "out").iterdir():
            left.unlink()
    assert scripted(lambda *_: "2", *flags) == 0


def test_an_unknown_flag_names_the_nearest():
    command = [sys.executable, "-m", "polymath_fast.evaluate", "--temprature", "0.6"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--temperature" in done.stdout + done.stderr


def test_completions_that_went_missing_are_noticed(file_of, scripted, tmp_path, capsys):
    path = file_of("f", {"problem": "1", "answer": "2"}, {"problem": "3", "answer": "4"})
    out = tmp_path / "out"
    assert scripted(lambda *_: "2", "--dataset", path, "--output-dir", str(out)) == 0
    rows = (out / "completions.jsonl").read_text().splitlines()
    (out / "completions.jsonl").write_text(rows[0] + "\n")
    flags = ["--result-path", str(out), "--output-dir", str(tmp_path / "again")]
    assert evaluate.main(flags) == 2
    assert "has 1 completions" in (said := capsys.readouterr().err) and "counts 2" in said


@pytest.mark.parametrize("line", ["{", "[]", '{"source": "f"}', '{"source": 1}'])
def test_a_broken_completions_file_is_named(tmp_path, line):
    (tmp_path / "result.json").write_text('{"completions": "completions.jsonl"}')
    (tmp_path / "completions.jsonl").write_text(line + "\n")
    with result_folder.grader(1.0) as grader, pytest.raises(UserError, match="completions.jsonl:1"):
        result_folder.regrade(tmp_path / "result.json", Grading(), grader)
