"""From a row of a data set to a problem with its answer, or to a message saying what is wrong."""

from __future__ import annotations

import decimal
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polymath_fast.errors import UserError

_PROBLEMS = ("problem", "question", "prompt")
_ANSWERS = ("answer", "ground_truth", "reward_model.ground_truth")
# What a reward function receives under these names comes from the run, not from the data.
_RESERVED = ("prompts", "completions", "completion_ids", "self")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A checked row."""

    where: str
    """file and line, for messages"""
    text: str
    """the question; of a conversation, its last user turn"""
    answer: str
    messages: tuple[dict[str, str], ...] | None
    """a conversation that is rendered as it is, instead of `text` through a template"""
    columns: dict[str, Any]
    """all columns but the problem and `answer`"""

    def key(self) -> str:
        """Equal for identical rows."""
        row = [self.text, self.answer, self.messages, self.columns]
        return json.dumps(row, sort_keys=True, default=repr)

    def written(self) -> str:
        """Everything in the prompt that comes from the row."""
        return "\n".join(
            message["content"] for message in self.messages or [{"content": self.text}]
        )


def parse(where: str, row: dict[str, Any]) -> Problem:
    """Check a row that stands at `where`.

    The problem is column problem, question or prompt, as text or as a list of messages. The answer
    is column answer, ground_truth or reward_model.ground_truth, as text or number; of a solution in
    the manner of GSM8K it is what follows the last ####. It may be empty. Raises UserError.
    """
    for name in _RESERVED:
        if name in row:
            raise UserError(
                f"{where}: a column is named {name!r}, which rewards get from the run; rename it"
            )
    column = next((name for name in _PROBLEMS if row.get(name) is not None), None)
    if column is None:
        raise _missing(where, row, _PROBLEMS)
    value, messages = row[column], None
    if isinstance(value, list | tuple):
        messages = _messages(where, column, value)
        value = next(m["content"] for m in reversed(messages) if m["role"] == "user")
    _check_text(where, column, value)
    columns = {name: entry for name, entry in row.items() if name not in (column, "answer")}
    return Problem(
        where=where, text=value, answer=_answer(where, row), messages=messages, columns=columns
    )


def _answer(where: str, row: dict[str, Any]) -> str:
    nested = row.get("reward_model")
    nested = nested if isinstance(nested, dict) else {}
    found = {name: row.get(name, nested.get(name.rpartition(".")[2])) for name in _ANSWERS}
    name = next((name for name, value in found.items() if value is not None), None)
    if name is None:
        raise _missing(where, row, _ANSWERS)
    value = found[name]
    if isinstance(value, int | float | decimal.Decimal) and not isinstance(value, bool):
        # a whole number is finite, and may be too large for isfinite to look at
        if not isinstance(value, int) and not math.isfinite(value):
            raise UserError(f"{where}: {name} is {value}; it must be a finite number or text")
        value = str(value)
    if isinstance(value, list | tuple):
        raise UserError(
            f"{where}: {name} is a list; it must be one text or number: where several are right, "
            "name them in another column for a --reward of your own"
        )
    _check_text(where, name, value, empty=True)
    return value.rpartition("####")[2].strip()


def _check_text(where: str, name: str, value: object, *, empty: bool = False) -> None:
    if not isinstance(value, str):
        kind = type(value).__name__
        raise UserError(f"{where}: {name} is a {kind}; it must be text")
    if not empty and not value.strip():
        raise UserError(f"{where}: {name} is empty; write it there, or delete the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {name} holds half of a character ({error.object[error.start]!r}); mend it"
        ) from None


def _missing(where: str, row: dict[str, Any], wanted: Sequence[str]) -> UserError:
    nulls = [name for name in wanted if name in row]
    there = ", ".join(map(repr, row)) or "nothing"
    reason = f"{nulls[0]} is null" if nulls else f"no column {' or '.join(wanted)}"
    return UserError(f"{where}: {reason}; the columns there are {there}")


def _messages(where: str, column: str, value: Sequence[Any]) -> tuple[dict[str, str], ...]:
    """A conversation of role and content, with a user turn."""
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(
                f"{where}: {column} holds {message!r:.80}; each message needs a role and a content"
            )
        for key in ("role", "content"):
            _check_text(where, f"{column}.{key}", message[key])
    if not any(message["role"] == "user" for message in value):
        roles = ", ".join(message["role"] for message in value) or "no message"
        raise UserError(f"{where}: {column} has no user turn ({roles}); add one")
    return tuple({"role": m["role"], "content": m["content"]} for m in value)
