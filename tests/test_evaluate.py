"""Evaluation: files of every shape, grading, mean@k and pass@k, result files and grading again."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from polymath_fast import evaluate, rewards, samples
from polymath_fast.config import Config
from polymath_fast.errors import UserError
from polymath_fast.evaluation import problem_files, result_folder
from polymath_fast.evaluation.estimates import estimate, pass_at_k, wilson
from polymath_fast.evaluation.grading import evaluate_samples
from polymath_fast.evaluation.problem_files import Grading
from polymath_fast.evaluation.settings import EvalSettings
from polymath_fast.rollout.types import Completion
from polymath_fast.samples import Sample

ROWS = {
    "aime": {"problem": "p", "solution": r"\boxed{1}", "answer": "204"},
    "amc": {"id": 0, "problem": "p", "question": "p", "answer": 27.0},
    "gsm8k": {"question": "p", "answer": "2 + 40 = <<2+40=42>>42\n#### 42"},
    "minerva": {"problem": "p", "solution": r"so \boxed{3} and \[x=\boxed{4.5e33} \text{erg}\]"},
    "olympiad": {"context": None, "question": "p", "solution": ["long"], "final_answer": ["$7$"]},
    "olympiad_2": {"question": "p", "final_answer": ["$69$", "$84$"]},
    "mmlu": {"question": "p", "type": "biology", "choices": ["a", "b", "c", "d"], "answer": 2},
    "sat": {"question": "p", "options": "A) $1$ B) $2$ C) $3$", "Answer": "B"},
    "by_text": {"question": "p", "choices": ["red", "blue"], "answer": "blue"},
    "by_table": {"question": "p", "choices": {"A": "x", "B": "y"}, "answer": "(B)"},
    "verl": {
        "data_source": "minerva_verl",
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}],
        "reward_model": {"ground_truth": "5", "style": "rule"},
    },
}


@pytest.fixture
def file_of(tmp_path):
    def write(name: str, *rows: dict) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("name", "answer", "letter", "letters"),
    [
        ("aime", "204", None, ""),
        ("amc", "27", None, ""),
        ("gsm8k", "42", None, ""),
        ("minerva", "4.5e33", None, ""),
        ("olympiad", "$7$", None, ""),
        ("olympiad_2", "$69$, $84$", None, ""),
        ("mmlu", "C", "C", "ABCD"),
        ("sat", "B", "B", "ABC"),
        ("by_text", "B", "B", "AB"),
        ("by_table", "B", "B", "AB"),
        ("verl", "5", None, ""),
    ],
)
def test_rows_of_known_sets_load(file_of, name, answer, letter, letters):
    (item,) = problem_files.read(file_of(name, ROWS[name]), "test", Grading())
    assert (item.problem.answer, item.letter, item.letters) == (answer, letter, letters)
    assert item.source == ("minerva_verl" if name == "verl" else name)
    assert item.problem.text.startswith("p")


def test_options_are_shown_and_context_comes_first(file_of):
    (item,) = problem_files.read(
        file_of("m", ROWS["mmlu"] | {"context": "Cells."}), "test", Grading()
    )
    lines = item.problem.text.splitlines()
    assert lines == [
        *("Cells.", "p", "A. a", "B. b", "C. c", "D. d"),
        "Answer with the letter of the right option.",
    ]


def test_sources_may_be_graded_otherwise(file_of):
    path = file_of("m", ROWS["mmlu"])
    (item,) = problem_files.read(path + "=x", "test", Grading(open_ended=["x"]))
    assert (item.source, item.problem.text, item.problem.answer) == ("x", "p", "c")
    assert item.letter is None
    path = file_of("gpqa", {"problem": "p (A) 1 (B) 2", "answer": "(b)"})
    (item,) = problem_files.read(path, "test", Grading(multiple_choice=["gpqa"]))
    assert item.letter == "B"
    with pytest.raises(UserError, match="in --open-ended-sources and in --mcp-sources"):
        Grading(open_ended=["x"], multiple_choice=["x"])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"problem": "p"}, r"f.jsonl:1: no column answer"),
        ({"problem": "p", "solution": "no box"}, "no column answer"),
        ({"problem": "p", "answer": ""}, "the answer is empty"),
        ({"question": "p", "choices": ["a", "b"], "answer": 2}, r"the index \(0 to 1\)"),
        ({"question": "p", "choices": ["a", "b"], "answer": "c"}, "answer is 'c'"),
        ({"question": "p", "choices": ["a", "b"]}, "answer is None"),
        ({"question": "p", "choices": ["a"], "answer": 0}, "a list of 2 to 26 texts"),
        ({"question": "p", "choices": 3, "answer": 0}, "a list of 2 to 26 texts"),
    ],
)
def test_rows_that_cannot_be_graded_are_named(file_of, row, said):
    with pytest.raises(UserError, match=said):
        problem_files.read(file_of("f", row), "test", Grading())


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for n, c in itertools.product(range(1, 7), range(7)):
        if c > n:
            continue
        completions = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            draws = [any(draw) for draw in itertools.combinations(completions, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws))
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)


def test_wilson_interval_solves_its_equation():
    for share, size in [(0.0, 30), (0.375, 40), (0.5, 8), (1.0, 500)]:
        for bound in wilson(share, size):
            distance = abs(bound - share) - 1.959964 * math.sqrt(bound * (1 - bound) / size)
            assert distance == pytest.approx(0.0, abs=1e-9) or bound in (0.0, 1.0)
    assert wilson(0.375, 40) == pytest.approx((0.2422, 0.5297), abs=1e-4)


def test_interval_of_clustered_completions():
    same = estimate([1.0, 0.0] * 20, 8)
    assert (same.low, same.high) == wilson(0.5, 40), "completions that agree count once"
    mixed = estimate([0.5] * 40, 8)
    assert (mixed.low, mixed.high) == wilson(0.5, 320), "at most every completion counts"
    once = estimate([1.0] * 15 + [0.0] * 25, 1)
    assert (once.low, once.high) == wilson(0.375, 40)


def test_intervals_cover_the_truth():
    generator, covered, runs = random.Random(0), 0, 400
    for _ in range(runs):
        chances = [generator.betavariate(0.5, 0.5) for _ in range(40)]
        means = [sum(generator.random() < p for _ in range(8)) / 8 for p in chances]
        interval = estimate(means, 8)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.92 <= covered / runs <= 0.99


class Letters:
    """A tokenizer with one id a character; 0 ends a completion."""

    eos_token_id = 0
    chat_template = None
    added_tokens_decoder: dict = {}

    def encode(self, text, add_special_tokens=True, **_):
        return [ord(character) for character in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(i) for i in ids if i)


class Scripted:
    """An engine that answers attempt j to a prompt with `script(prompt, j)`."""

    def __init__(self, script):
        self.script, self.calls, self.closed = script, [], False

    def generate_many(self, prompts, n, sampling):
        self.calls.append((len(prompts), n, sampling))
        return [[self._answer(ids, j) for j in range(n)] for ids in prompts]

    def _answer(self, ids, j):
        text = self.script("".join(map(chr, ids)), j)
        cut = text.endswith("...")
        ids = [ord(c) for c in text] + [0] * (not cut)
        return Completion(
            token_ids=ids,
            sampling_logprobs=[0.0] * len(ids),
            finish_reason="length" if cut else "stop",
            weight_version=0,
        )

    def close(self):
        self.closed = True


def sample(problem: str, answer: str) -> Sample:
    return Sample(problem, answer, problem, tuple(map(ord, problem)), {"level": 3})


def test_evaluate_samples_grades_what_was_sampled():
    engine = Scripted(lambda prompt, j: rf"\boxed{{{int(prompt[0]) + j}}}" + "..." * (j == 3))
    asked = [sample("1+0", "1"), sample("2+1", "3"), sample("9", "0")]
    with rewards.build(["math", "format"], [1.0, 0.2]) as built:
        result = evaluate_samples(
            engine,
            Letters(),
            asked,
            k=4,
            temperature=0.6,
            max_completion_length=64,
            seed=5,
            score=built.score,
        )
    assert result.per_problem == [
        [True, False, False, False],
        [False, True, False, False],
        [False] * 4,
    ]
    assert [(n, k) for n, k, _ in engine.calls] == [(3, 4)]
    assert (engine.calls[0][2].seed, engine.calls[0][2].temperature) == (5, 0.6)
    metrics = result.metrics()
    assert metrics["mean@4"] == pytest.approx(2 / 12)
    assert metrics["pass@4"] == pytest.approx(2 / 3)
    assert (metrics["correct"], metrics["completions"]) == (2, 12)
    assert 0 < metrics["low"] < metrics["mean@4"] < metrics["high"] < 1
    assert metrics["truncated_ratio"] == 0.25
    assert (
        metrics["mean_length"] == sum(len(row["completion"]) + 1 for row in result.rows) / 12 - 0.25
    )
    assert result.pass_at(2).value == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert result.rows[5] == {
        "index": 1,
        "attempt": 1,
        "problem": "2+1",
        "answer": "3",
        "prompt": "2+1",
        "completion": r"\boxed{3}",
        "length": 10,
        "finish_reason": "stop",
        "right": True,
    }


@pytest.fixture
def scripted(monkeypatch):
    """Runs the command with a scripted model in place of a real one."""
    engines = []

    def run(script, *flags: str) -> int:
        engines.append(Scripted(script))
        monkeypatch.setattr(evaluate.models, "resolve_model", lambda *_: "somewhere")
        monkeypatch.setattr(evaluate.models, "context_length", lambda _: 200)
        monkeypatch.setattr(evaluate, "load_tokenizer", lambda _: Letters())
        monkeypatch.setattr(evaluate.rollout, "stop_token_ids", lambda *_: [0])
        monkeypatch.setattr(evaluate.rollout, "build_engine", lambda *_, **__: engines[-1])
        plain = ["--template", "plain", "--instruction", "", "--max-completion-length", "50"]
        asking = [] if "--result-path" in flags else [*plain, "--engine", "transformers"]
        return evaluate.main([*asking, *flags])

    yield run
    assert all(engine.closed for engine in engines if engine.calls)


def test_the_command_keeps_completions_and_figures(file_of, scripted, tmp_path, capsys):
    sums = file_of("sums", {"problem": "1+1", "answer": "2"}, {"problem": "2+2", "answer": "4"})
    letters = file_of("letters", ROWS["mmlu"])
    out = tmp_path / "out"

    def script(prompt, j):
        return r"\boxed{C}" if "letter" in prompt else rf"\boxed{{{int(prompt[0]) + 1 + j}}}"

    flags = ["--dataset", sums, letters + "=biology", "--k", "2", "--temperature", "0.6"]
    assert scripted(script, *flags, "--output-dir", str(out)) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["results"]["sums"]["mean@2"]["value"] == 0.5
    assert result["results"]["sums"]["pass@2"]["value"] == 1.0
    assert result["results"]["biology"]["mean@2"]["value"] == 1.0
    assert result["settings"]["temperature"] == 0.6
    assert result["versions"]["math-verify"] == "0.9.0"
    rows = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    assert [(row["source"], row["index"], row["attempt"], row["right"]) for row in rows] == [
        *(("sums", 0, 0, True), ("sums", 0, 1, False), ("sums", 1, 0, False), ("sums", 1, 1, True)),
        *(("biology", 0, 0, True), ("biology", 0, 1, True)),
    ]
    printed = capsys.readouterr().out
    assert "50.0% (" in printed
    assert str(out / "result.json") in printed
    assert scripted(script, *flags, "--output-dir", str(out)) == 2, "results are not overwritten"


def test_prompts_are_those_of_training(file_of, scripted, tmp_path, monkeypatch):
    """Also of a tokenizer that closes what it is given, which would end the completion."""

    def encode(self, text, add_special_tokens=True, **_):
        return [*map(ord, text), *[self.eos_token_id] * add_special_tokens]

    monkeypatch.setattr(Letters, "encode", encode)
    path, seen = file_of("f", {"problem": "1+1", "answer": "2"}), []
    flags = ["--dataset", path, "--output-dir", str(tmp_path / "out")]
    assert scripted(lambda prompt, j: seen.append(prompt) or "2", *flags) == 0
    trained = samples.from_config(
        Config(dataset=path, template="plain", instruction="", max_completion_length=50), Letters()
    )
    assert seen == ["1+1\n"]
    assert [tuple(map(ord, prompt)) for prompt in seen] == [each.prompt_ids for each in trained]


def test_a_prompt_too_long_names_what_works_for_all(file_of, scripted, tmp_path, capsys):
    rows = [{"problem": "1" * length, "answer": "2"} for length in (159, 179, 169)]
    flags = ["--dataset", file_of("f", *rows), "--output-dir", str(tmp_path / "out")]
    assert scripted(lambda *_: "2", *flags) == 2
    said = capsys.readouterr().err
    assert "f.jsonl:2" in said and "--max-completion-length 20 works" in said
    assert scripted(lambda *_: "2", *flags, "--max-completion-length", "20") == 0


def test_many_problems_are_asked_in_parts(file_of, scripted, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "_COMPLETIONS_AT_ONCE", 4)
    path = file_of("sums", *({"problem": f"{n}+0", "answer": str(n)} for n in range(5)))
    out = tmp_path / "out"
    flags = ["--dataset", path, "--k", "2", "--temperature", "1", "--output-dir", str(out)]
    assert scripted(lambda prompt, j: prompt[0], *flags) == 0
    rows = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert json.loads((out / "result.json").read_text())["results"]["sums"]["correct"] == 10


def test_grading_again_needs_no_model(file_of, scripted, tmp_path, monkeypatch):
    path = file_of("gpqa", {"problem": "p", "answer": "B"}, {"problem": "q", "answer": "C"})
    first, second = tmp_path / "first", tmp_path / "second"
    answer = r"\boxed{B. mitosis}"
    flags = ["--dataset", path, "--output-dir", str(first)]
    assert scripted(lambda prompt, j: answer, *flags) == 0
    assert json.loads((first / "result.json").read_text())["results"]["gpqa"]["correct"] == 0
    monkeypatch.setattr(evaluate.models, "resolve_model", None)
    flags = ["--result-path", str(first / "result.json"), "--output-dir", str(second)]
    assert evaluate.main([*flags, "--mcp-sources", "gpqa"]) == 0
    again = json.loads((second / "result.json").read_text())
    assert again["results"]["gpqa"]["correct"] == 1
    assert again["regraded_from"] == str(first / "result.json")
    made_with = json.loads((first / "result.json").read_text())["settings"]
    assert again["settings"]["dataset"] == made_with["dataset"] == [path]
    assert again["settings"]["mcp_sources"] == ["gpqa"]
    third = tmp_path / "third"
    flags = ["--result-path", str(second), "--output-dir", str(third)]
    assert evaluate.main([*flags, "--open-ended-sources", "gpqa"]) == 0
    assert json.loads((third / "result.json").read_text())["results"]["gpqa"]["correct"] == 0


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


def test_seeds_are_those_of_training():
    EvalSettings(seed=2**32 - 1).check()


def test_defaults_are_greedy_and_single():
    assert (EvalSettings().k, EvalSettings().temperature) == (1, 0.0)
