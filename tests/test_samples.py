"""Samples: sources, templates, token ids; checked against files written here and by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from polymath_fast.config import Config
from polymath_fast.errors import UserError
from polymath_fast.models import resolve_model
from polymath_fast.samples import (
    Sample,
    from_config,
    held_out,
    load_samples,
    load_tokenizer,
    problems,
    prompts,
    sources,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(resolve_model("random:tiny"))


def load(tokenizer: Any, **given: Any) -> list[Sample]:
    settings = {
        "question": None,
        "answer": None,
        "dataset": None,
        "dataset_split": "train",
        "max_samples": None,
        "template": "plain",
        "instruction": "",
        "max_completion_length": 8,
    }
    return load_samples(tokenizer=tokenizer, **{**settings, **given})


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def parquet(path: Path, *rows: dict) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return str(path)


def test_importing_loads_nothing_heavy() -> None:
    heavy = "('torch', 'transformers', 'datasets', 'pyarrow', 'huggingface_hub')"
    modules = "polymath_fast.samples, polymath_fast.models"
    code = f"import {modules}, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_sample_from_flags(tokenizer: Any) -> None:
    (sample,) = load(tokenizer, question="What is 6 * 7?", answer="42")
    assert (sample.problem, sample.answer, sample.columns) == ("What is 6 * 7?", "42", {})
    assert sample.prompt == "What is 6 * 7?\n"
    assert bytes(tokenizer.decode(sample.prompt_ids), "utf-8") == b"What is 6 * 7?\n"
    assert isinstance(sample.prompt_ids, tuple)


def test_jsonl_with_its_columns(tokenizer: Any, tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "a.jsonl",
        {"problem": "1 + 1?", "answer": 2, "level": "easy"},
        {"question": "0.5 + 1?", "answer": 1.5, "tags": ["x"]},
        {"prompt": "2 + 2?", "ground_truth": " 4 "},
        {"question": "3 + 3?", "answer": "3 + 3 = <<3+3=6>>6 so\n#### 6"},
    )
    samples = load(tokenizer, dataset=file)
    assert [s.problem for s in samples] == ["1 + 1?", "0.5 + 1?", "2 + 2?", "3 + 3?"]
    assert [s.answer for s in samples] == ["2", "1.5", "4", "6"]
    assert samples[0].columns == {"level": "easy"}
    assert samples[1].columns == {"tags": ["x"]}


def test_parquet_plain_and_verl_style(tokenizer: Any, tmp_path: Path) -> None:
    plain = parquet(tmp_path / "a.parquet", {"problem": "1 + 1?", "answer": "2"})
    assert load(tokenizer, dataset=plain)[0].answer == "2"
    verl = {
        "data_source": "x",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}],
        "reward_model": {"ground_truth": "2", "style": "rule"},
    }
    (sample,) = load(tokenizer, dataset=parquet(tmp_path / "b.parquet", verl), template="chat")
    assert (sample.problem, sample.answer) == ("1+1?", "2")
    assert sample.prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert sample.columns["data_source"] == "x"


def test_a_conversation_is_not_touched_by_the_template_and_that_is_said(
    tokenizer: Any, tmp_path: Path
) -> None:
    row = {"prompt": [{"role": "user", "content": "1+1?"}], "answer": "2"}
    said: list[str] = []
    file = jsonl(tmp_path / "a.jsonl", row)
    (sample,) = load(
        tokenizer, dataset=file, template="polymath", instruction=None, notify=said.append
    )
    assert sample.prompt == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert len(said) == 1 and "as they are" in said[0]


def test_identical_rows_are_one_sample_and_that_is_said(tokenizer: Any, tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": "1+1?"}],
        "reward_model": {"ground_truth": "2"},
        "extra_info": {"index": 7},
    }
    said: list[str] = []
    file = parquet(tmp_path / "a.parquet", *[row] * 128)
    assert len(load(tokenizer, dataset=file, template="chat", notify=said.append)) == 1
    assert len(said) == 1 and "128 rows, 1 of them distinct" in said[0]
    other = {**row, "extra_info": {"index": 8}}
    file = parquet(tmp_path / "b.parquet", row, other, row)
    assert len(load(tokenizer, dataset=file, template="chat", notify=said.append)) == 2


def test_max_samples_counts_distinct_rows(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"problem": f"{n // 2} + 1?", "answer": n // 2 + 1} for n in range(10)]
    samples = load(tokenizer, dataset=jsonl(tmp_path / "a.jsonl", *rows), max_samples=3)
    assert [s.answer for s in samples] == ["1", "2", "3"]


def test_the_prompt_just_fits_or_is_refused_with_the_numbers(tokenizer: Any) -> None:
    asked = {"question": "abcd", "answer": "1", "max_completion_length": 10}
    # The byte-level tokenizer: four letters and a newline.
    assert len(load(tokenizer, **asked, context_length=15)[0].prompt_ids) == 5
    with pytest.raises(UserError) as error:
        load(tokenizer, **asked, context_length=14)
    for part in ("5 tokens", "10", "is 15", "14 positions", "--max-completion-length 9 works"):
        assert part in str(error.value)
    with pytest.raises(UserError, match="shorten the prompt"):
        load(tokenizer, **asked, context_length=5)


def test_templates(tokenizer: Any) -> None:
    def prompt(template: str, instruction: str | None = None) -> str:
        return prompts.renderer(template, instruction, tokenizer)("1 + 1?")

    boxed = "output the final answer within \\boxed{}."
    assert prompt("plain") == f"1 + 1? Let's think step by step and {boxed}\n"
    assert prompt("plain", "Go.") == "1 + 1? Go.\n"
    assert prompt("chat", "") == ("<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n")
    assert prompt("chat", "Go.").count("1 + 1? Go.<|im_end|>") == 1
    assert prompt("qwen25-math-cot") == (
        "<|im_start|>system\n"
        "Please reason step by step, and put your final answer within \\boxed{}."
        "<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )
    polymath = prompt("polymath")
    assert polymath.startswith("A conversation between User and Assistant. ")
    assert polymath.endswith("(A, B, C, D, etc.).\n1 + 1?\nAssistant:")
    assert polymath.count("\\boxed{}") == 3


def test_a_problem_with_percent_signs_and_braces_is_kept(tokenizer: Any) -> None:
    problem = "What is 5% of {x} %s %d \\frac{1}{2}?"
    for template in ("plain", "polymath", "chat", "qwen25-math-cot"):
        assert problem in prompts.renderer(template, None, tokenizer)(problem)


def test_start_tokens_are_added_to_bare_text_only(tokenizer: Any) -> None:
    """As with Llama: the tokenizer adds a start token, the chat template writes its own."""

    class StartsAndEnds:
        added_tokens_decoder: dict = {}
        chat_template = "x"
        eos_token_id = 2

        def encode(self, text: str, add_special_tokens: bool, verbose: bool) -> list[int]:
            return [1, 50, 2] if add_special_tokens else [50]

        def apply_chat_template(self, messages: list, **_: Any) -> str:
            return "rendered"

    fake = StartsAndEnds()
    asked = {"question": "1?", "answer": "1"}
    assert load(fake, **asked, template="plain")[0].prompt_ids == (1, 50)
    assert load(fake, **asked, template="chat")[0].prompt_ids == (50,)


def test_every_shipped_sample_can_be_asked(tokenizer: Any) -> None:
    names = [json.loads(line)["name"] for line in (sources.SHIPPED / "samples.jsonl").open()]
    assert {"rectangle", "turbine", "prime"} <= set(names)
    for name in names:
        (sample,) = from_config(Config(dataset=f"shipped:{name}"), tokenizer)
        assert sample.answer and sample.problem in sample.prompt


def test_another_set_is_asked_in_the_same_way_and_as_a_whole(tokenizer: Any) -> None:
    config = Config(question="1?", answer="1", template="plain", instruction="Go.", max_samples=1)
    rows = from_config(config, tokenizer, dataset="shipped:rectangle_held_out")
    assert len(rows) == held_out.COUNT
    assert all(row.prompt == f"{row.problem} Go.\n" for row in rows)
    assert [row.problem for row in from_config(config, tokenizer)] == ["1?"]


def test_rows_from_the_hub(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    import types

    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> list[dict]:
        asked.append((name, split))
        return [{"problem": "1+1?", "answer": "2"}]

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    (sample,) = load(tokenizer, dataset="owner/name", dataset_split="test")
    assert (sample.answer, asked) == ("2", [("owner/name", "test")])


def test_the_key_of_a_row_tells_rows_apart() -> None:
    def key(**row: Any) -> str:
        return problems.parse("here", {"problem": "1?", "answer": "1", **row}).key()

    assert key(a=1, b=2) == key(b=2, a=1)
    assert len({key(), key(a=1), key(a="1"), key(answer="2"), key(problem="2?")}) == 5
