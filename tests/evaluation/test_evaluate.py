"""An evaluation: what is asked and graded, its result folder, and grading again."""

from __future__ import annotations

import json

import pytest
from letters import ROWS, Letters, Scripted

from polymath_fast import evaluate, rewards, samples
from polymath_fast.config import Config
from polymath_fast.evaluation.grading import evaluate_samples
from polymath_fast.evaluation.settings import EvalSettings
from polymath_fast.samples import Sample


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


def test_seeds_are_those_of_training():
    EvalSettings(seed=2**32 - 1).check()


def test_defaults_are_greedy_and_single():
    assert (EvalSettings().k, EvalSettings().temperature) == (1, 0.0)
