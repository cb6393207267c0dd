"""Bad data: each gives one clear message with the file, the row and what would work."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_rows import GOOD, load, refused

from polymath_fast.errors import UserError
from polymath_fast.models import resolve_model
from polymath_fast.samples import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(resolve_model("random:tiny"))


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b" \r\n"])
def test_an_empty_file(content: bytes, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    refused(tokenizer, file, str(file), "is empty")


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (b'{"problem": "x", "answer": ', "not valid JSON"),
        (b"[1, 2]", "a list, not an object"),
        (b'"text"', "a str, not an object"),
        (b'{"problem": "caf\xe9", "answer": "1"}', "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"problem": "\\ud800", "answer": "1"}', "half of a character"),
        (b'{"problem": "x", "answer": NaN}', "finite"),
    ],
)
def test_a_broken_line_is_named(line: bytes, part: str, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    refused(tokenizer, file, f"{file}:3", part)


def test_a_whole_number_beyond_the_floats(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"problem": "x?", "answer": ' + "9" * 400 + "}")
    assert [s.answer for s in load(tokenizer, str(file))] == ["9" * 400]


def test_a_byte_order_mark_crlf_blank_lines_and_line_separators_do_no_harm(
    tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    line = json.dumps({"problem": "a\u2028b?", "answer": "2"}, ensure_ascii=False).encode()
    file.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + json.dumps(GOOD).encode())
    assert [s.problem for s in load(tokenizer, str(file))] == ["a\u2028b?", "1 + 1?"]


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"text": "x", "answer": "1"}, ["no column problem", "'text', 'answer'"]),
        ({"problem": None, "answer": "1"}, ["problem is null"]),
        ({"problem": "", "answer": "1"}, ["problem is empty"]),
        ({"problem": " \n", "answer": "1"}, ["problem is empty"]),
        ({"problem": 5, "answer": "1"}, ["problem is a int", "must be text"]),
        ({"problem": {"a": 1}, "answer": "1"}, ["problem is a dict"]),
        ({"problem": "x"}, ["no column answer", "'problem'"]),
        ({"problem": "x", "answer": None}, ["answer is null"]),
        ({"problem": "x", "answer": ["1", "2"]}, ["answer is a list", "a --reward of your own"]),
        ({"problem": "x", "answer": True}, ["answer is a bool"]),
        ({"problem": "x", "reward_model": {"style": "rule"}}, ["no column answer"]),
        ({"problem": "x", "reward_model": "y"}, ["no column answer"]),
        ({**GOOD, "prompts": 1}, ["'prompts'", "rename"]),
        ({**GOOD, "completions": 1}, ["'completions'", "rename"]),
        ({**GOOD, "self": 1}, ["'self'", "rename"]),
        ({}, ["there are nothing"]),
        ({"prompt": [], "answer": "1"}, ["no user turn", "no message"]),
        (
            {"prompt": [{"role": "system", "content": "x"}], "answer": "1"},
            ["no user turn", "system"],
        ),
        ({"prompt": [{"role": "user"}], "answer": "1"}, ["needs a role and a content"]),
        ({"prompt": ["x"], "answer": "1"}, ["needs a role and a content"]),
        ({"prompt": [{"role": "user", "content": None}], "answer": "1"}, ["prompt.content"]),
        ({"prompt": [{"role": "user", "content": ""}], "answer": "1"}, ["prompt.content is empty"]),
    ],
)
def test_a_bad_row_is_named(row: dict, parts: list[str], tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps(row) + "\n")
    refused(tokenizer, file, f"{file}:2", *parts)


def test_a_row_without_an_answer_is_left_out_aloud_unless_it_is_the_only_one(
    tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    empty = json.dumps({"problem": "x", "answer": " "}) + "\n"
    file.write_text(json.dumps(GOOD) + "\n" + empty)
    said: list[str] = []
    assert len(load(tokenizer, str(file), notify=said.append)) == 1
    assert said == [f"{file}:2: the answer is empty, so this row is left out"]
    file.write_text(empty)
    refused(tokenizer, file, "is empty")


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>"])
def test_a_control_token_in_the_problem(token: str, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"problem": f"say {token}", "answer": "1"}))
    refused(tokenizer, file, f"{file}:1", repr(token), "take it out")
    messages = [{"role": "system", "content": token}, {"role": "user", "content": "x"}]
    file.write_text(json.dumps({"prompt": messages, "answer": "1"}))
    refused(tokenizer, file, f"{file}:1", repr(token), template="chat")


def test_a_prompt_longer_than_the_context(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"problem": "x" * 100_000, "answer": "1"}))
    refused(tokenizer, file, "100001 tokens", "2048 positions", "shorten", instruction="")


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_parquet_file(keep: int, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD] * 50), file)
    file.write_bytes(file.read_bytes()[:keep])
    refused(tokenizer, file, str(file), "not a complete parquet file")


def test_a_parquet_file_with_another_schema_or_no_row(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), file)
    refused(tokenizer, file, f"{file}: row 1", "no column problem", "'x'")
    schema = pyarrow.schema([("problem", pyarrow.string()), ("answer", pyarrow.string())])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([], schema=schema), file)
    refused(tokenizer, file, "is empty")


def test_a_data_set_that_is_not_there(tokenizer: Any, tmp_path: Path) -> None:
    refused(tokenizer, tmp_path / "none.jsonl", "not there")
    refused(tokenizer, tmp_path, "not a .jsonl or .parquet file")
    csv = tmp_path / "a.csv"
    csv.write_text("problem,answer\n")
    refused(tokenizer, csv, "not a .jsonl or .parquet file", "save it as jsonl")
    folder = tmp_path / "d.jsonl"
    folder.mkdir()
    refused(tokenizer, folder, "a folder")
    refused(tokenizer, "shipped:rectnagle", "perhaps you meant shipped:rectangle")
    refused(tokenizer, "shipped:../samples", "not shipped")
    refused(tokenizer, "shipped:", "there are rectangle")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(GOOD))
    file.chmod(0)
    refused(tokenizer, file, "cannot be read")


def test_the_hub_without_its_package_or_without_a_network(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import types

    def load_dataset(name: str, split: str) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nmore")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    refused(tokenizer, "owner/name", "split train", "Couldn't reach")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(tokenizer, "owner/name", "pip install 'polymath-fast[hub]'")


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"template": "polymath", "instruction": "Go."}, ["--instruction", "leave it out"]),
        ({"template": "chta"}, ["'chta'", "chat, plain, polymath"]),
    ],
)
def test_templates_that_cannot_be_used(given: dict, parts: list[str], tokenizer: Any) -> None:
    refused(tokenizer, "shipped:rectangle", *parts, **given)


def test_a_tokenizer_without_chat_template_or_end_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(resolve_model("random:tiny"))
    plain.chat_template = None
    refused(plain, "shipped:rectangle", "no chat template", "--template plain", template="chat")
    assert load(plain, "shipped:rectangle")[0].prompt_ids
    plain.eos_token = None
    plain.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_chat_template_that_refuses_the_conversation(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    strict = AutoTokenizer.from_pretrained(resolve_model("random:tiny"))
    strict.chat_template = "{{ raise_exception('no system turn here') }}"
    refused(strict, "shipped:rectangle", "no system turn here", template="chat")
    strict.chat_template = {"tool_use": "x", "rag": "y"}
    refused(strict, "shipped:rectangle", "refuses these messages", template="chat")


def test_a_chat_template_with_a_clock_asks_the_same_every_day(tokenizer: Any) -> None:
    """A resumed run goes on with the prompt that it began with."""
    from transformers import AutoTokenizer

    dated = AutoTokenizer.from_pretrained(resolve_model("random:tiny"))
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0]['content'] }}"
    sample = load(dated, "shipped:rectangle", template="chat")[0]
    assert sample.prompt.startswith("26 Jul 2024: A rectangle")
