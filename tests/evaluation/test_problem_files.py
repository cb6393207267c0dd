"""Files of problems in every shape, and rows that cannot be graded."""

from __future__ import annotations

import pytest
from letters import ROWS

from polymath_fast.errors import UserError
from polymath_fast.evaluation import problem_files
from polymath_fast.evaluation.problem_files import Grading


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
