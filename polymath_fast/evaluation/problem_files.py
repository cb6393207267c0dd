"""Evaluation files as they are in the wild: one row in, one problem with a gradable answer out."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymath_fast.errors import UserError
from polymath_fast.rewards.extraction import last_box
from polymath_fast.samples import problems, sources
from polymath_fast.samples.problems import Problem

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LISTED_OPTION = re.compile(r"(?:^|\s)\(?([A-Z])[).:]\s")
_ASK_FOR_LETTER = "Answer with the letter of the right option."


@dataclass(frozen=True, kw_only=True)
class EvalProblem:
    """A problem of an evaluation file, and how its completions are graded."""

    source: str
    """name under which it is reported, and by which --mcp-sources selects it"""
    problem: Problem
    letter: str | None
    """right option of a multiple-choice problem; None: graded as open-ended"""
    letters: str
    """options there are, e.g. "ABCD"; empty for an open-ended problem"""


@dataclass(frozen=True, kw_only=True)
class Grading:
    """Which sources are graded how, whatever their rows look like."""

    open_ended: Collection[str] = ()
    multiple_choice: Collection[str] = ()

    def __post_init__(self) -> None:
        both = set(self.open_ended) & set(self.multiple_choice)
        if both:
            raise UserError(
                f"{sorted(both)[0]!r} is in --open-ended-sources and in --mcp-sources: name it in "
                "one of them"
            )

    def require_known(self, known: Collection[str]) -> None:
        """Raises UserError for a source that does not exist."""
        unknown = (set(self.open_ended) | set(self.multiple_choice)) - set(known)
        if unknown:
            raise UserError(
                f"there is no source {sorted(unknown)[0]!r} for --open-ended-sources or "
                f"--mcp-sources; there are {', '.join(sorted(known))}"
            )


def read(entry: str, split: str, grading: Grading) -> list[EvalProblem]:
    """The problems of `entry`, FILE or FILE=NAME; raises UserError naming file and line.

    A row has a problem (problem, question or prompt) and one of: answer as text or number, also
    with GSM8K's "####"; final_answer as a list (OlympiadBench); solution with a boxed answer
    (Minerva); choices or options with the index, the letter or the text of the right one (MMLU,
    SAT); ground_truth or reward_model.ground_truth (verl). The source is NAME, else the row's
    data_source, else the file's name.
    """
    dataset, name = sources.split_name(entry)
    fallback = Path(dataset.removeprefix("shipped:")).stem
    found = []
    for where, row in sources.read_rows(dataset, split):
        source = name or str(row.get("data_source") or fallback)
        found.append(_parse(where, row, source, grading))
    if not found:
        raise UserError(f"--dataset {dataset} is empty; one problem with its answer is enough")
    return found


def _parse(where: str, row: dict[str, Any], source: str, grading: Grading) -> EvalProblem:
    columns = {name.lower(): value for name, value in row.items() if value is not None}
    options = columns.get("choices", columns.get("options"))
    letter, letters, shown = None, "", ""
    if options is not None:
        texts, shown = _options(where, options)
        letters = "".join(texts)
        letter = _right_letter(where, columns.get("answer"), texts)
        if source in grading.open_ended:
            columns["answer"], shown = texts[letter] or letter, ""
            letter, letters = None, ""
        else:
            columns["answer"], shown = letter, f"\n{shown}\n{_ASK_FOR_LETTER}"
    elif "answer" not in columns:
        columns["answer"] = _derived_answer(columns)
    if options is None and source in grading.multiple_choice:
        letter, letters = _lone_letter(where, columns["answer"]), LETTERS
    problem = problems.parse(where, _canonical(columns, shown))
    if not problem.answer:
        raise UserError(f"{where}: the answer is empty, so nothing can be graded; delete the row")
    return EvalProblem(source=source, problem=problem, letter=letter, letters=letters)


def _canonical(columns: Mapping[str, Any], shown: str) -> dict[str, Any]:
    """The row as problems.parse knows it: context before, options behind the question."""
    row = dict(columns)
    for name in ("problem", "question", "prompt"):
        if isinstance(row.get(name), str):
            context = row.get("context")
            before = f"{context.strip()}\n" if isinstance(context, str) and context.strip() else ""
            row[name] = f"{before}{row[name]}{shown}"
    answer = row.get("answer")
    if isinstance(answer, float) and answer.is_integer():
        row["answer"] = f"{answer:.0f}"
    elif answer is None:
        row.pop("answer", None)
    return row


def _derived_answer(columns: Mapping[str, Any]) -> Any:
    """The answer where it does not stand under that name; None when it is nowhere here."""
    final = columns.get("final_answer")
    if isinstance(final, list):
        return ", ".join(str(part) for part in final)
    if final is None and isinstance(columns.get("solution"), str):
        return last_box(columns["solution"])
    return final


def _options(where: str, options: Any) -> tuple[dict[str, str], str]:
    """Texts by letter, and how they are shown; texts are empty where options are one string."""
    if isinstance(options, str):
        found = "".join(_LISTED_OPTION.findall(options))
        letters = found if found and LETTERS.startswith(found) else LETTERS[:10]
        return dict.fromkeys(letters, ""), options
    if isinstance(options, Mapping):
        texts = {str(key).upper(): str(value) for key, value in options.items()}
    elif isinstance(options, list):
        texts = dict(zip(LETTERS, map(str, options), strict=False))
    else:
        texts = {}
    if len(texts) < 2 or not set(texts) <= set(LETTERS) or len(texts) != len(options):
        raise UserError(
            f'{where}: the options must be a list of 2 to 26 texts, or a table such as {{"A": ...}}'
        )
    return texts, "\n".join(f"{letter}. {text}" for letter, text in texts.items())


def _right_letter(where: str, answer: Any, texts: Mapping[str, str]) -> str:
    letters = list(texts)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
        return letters[answer]
    if isinstance(answer, str):
        letter = answer.strip().strip("().").upper()
        if letter in texts:
            return letter
        matching = [key for key, text in texts.items() if text.strip() == answer.strip() != ""]
        if len(matching) == 1:
            return matching[0]
    raise UserError(
        f"{where}: answer is {answer!r}; with options it must be the index (0 to "
        f"{len(letters) - 1}), the letter ({letters[0]} to {letters[-1]}) or the text of one"
    )


def _lone_letter(where: str, answer: Any) -> str:
    letter = str(answer).strip().strip("().").upper()
    if len(letter) == 1 and letter in LETTERS:
        return letter
    raise UserError(
        f"{where}: answer is {answer!r}; a source in --mcp-sources needs an option letter there, "
        'e.g. "B"'
    )
