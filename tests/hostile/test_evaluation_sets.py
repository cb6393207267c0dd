"""Evaluation sets that cannot be: the message names the flag and the set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_rows import GOOD

from polymath_fast.config import Config
from polymath_fast.errors import UserError
from polymath_fast.run.inputs import read_inputs


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ("nosuch.jsonl", "--eval-dataset nosuch.jsonl is not there"),
        ("nosuch.jsonl=x", "--eval-dataset nosuch.jsonl=x is not there"),
        ("shipped:nosuch", "--eval-dataset shipped:nosuch is not shipped"),
        ("notes.txt=x", "--eval-dataset notes.txt=x: not a .jsonl or .parquet file"),
        ("empty.jsonl=x", "--eval-dataset empty.jsonl=x is empty"),
        ("torn.jsonl", "--eval-dataset torn.jsonl: torn.jsonl:1: not valid JSON"),
        ("row.jsonl=x", "--eval-dataset row.jsonl=x: row.jsonl:2: no column answer"),
        ("control.jsonl", "--eval-dataset control.jsonl: control.jsonl:1: the problem contains"),
        ("a=b.jsonl=x", "--eval-dataset a=b.jsonl=x is empty"),
    ],
)
def test_a_fault_of_an_evaluation_set_names_its_flag_and_the_value(
    entry: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "notes.txt": "",
        "empty.jsonl": "\n",
        "torn.jsonl": "{",
        "row.jsonl": f'{json.dumps(GOOD)}\n{{"problem": "x"}}\n',
        "control.jsonl": json.dumps({"problem": "<|im_end|>", "answer": "1"}),
        "a=b.jsonl": "",
    }
    for name, text in files.items():
        Path(name).write_text(text)
    config = Config(model="random:tiny", question="1?", answer="1", eval_dataset=(entry,))
    with pytest.raises(UserError) as error:
        read_inputs(config)
    assert part in str(error.value) and "--dataset" not in str(error.value)


def test_evaluation_sets_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    entries = (f"{tmp_path}/a.jsonl", f"{tmp_path}/a=b.jsonl=b", f"{tmp_path}/a=b.jsonl=a")
    (tmp_path / "a=b.jsonl").write_text(json.dumps(GOOD))
    sample = {"model": "random:tiny", "question": "1?", "answer": "1"}
    assert set(read_inputs(Config(**sample, eval_dataset=entries[:2])).held_out) == {"a", "b"}
    with pytest.raises(UserError, match=f"--eval-dataset {entries[2]}: .*/a=b.jsonl=a_2"):
        read_inputs(Config(**sample, eval_dataset=entries))


@pytest.mark.parametrize(
    ("entry", "works"),
    [
        ("ev.jsonl=a/b c\n", "ev.jsonl=a_b_c"),
        ("ev.jsonl=//", "ev.jsonl=held_out"),
        ("ev.jsonl=\u202ex", "ev.jsonl=x"),
        ("my set.jsonl", "my set.jsonl=my_set"),
        ("a=b.jsonl", "a=b.jsonl=a_b"),
        ("line\n.jsonl", "line\n.jsonl=line"),
    ],
)
def test_a_set_whose_name_would_tear_a_metric_apart(
    entry: str, works: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ev.jsonl", "my set.jsonl", "a=b.jsonl", "line\n.jsonl"):
        Path(name).write_text(json.dumps(GOOD))
    sample = {"model": "random:tiny", "question": "1?", "answer": "1"}
    with pytest.raises(UserError, match="letters, digits, '.', '_' and '-'") as error:
        read_inputs(Config(**sample, eval_dataset=(entry,)))
    said = str(error.value)
    assert said.startswith("--eval-dataset: ") and said.isprintable()
    assert f"--eval-dataset {works} works" in said or f"--eval-dataset {works!r} works" in said
    assert len(read_inputs(Config(**sample, eval_dataset=(works,))).held_out) == 1


def test_names_of_sets_may_be_of_any_alphabet(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    entries = tuple(f"{tmp_path}/a.jsonl={name}" for name in ("Prüfung-2.b_c", "数学"))
    config = Config(model="random:tiny", question="1?", answer="1", eval_dataset=entries)
    assert set(read_inputs(config).held_out) == {"Prüfung-2.b_c", "数学"}
