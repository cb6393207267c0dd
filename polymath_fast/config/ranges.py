"""What a setting's annotation says of its value: a range, a choice; and text that may be written.

Every refusal is one UserError that names the flag, its value, the rule and a value that works.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, get_args, get_origin, get_type_hints

from polymath_fast.errors import UserError

if TYPE_CHECKING:
    from polymath_fast.config import Config

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}|://[^/\s]*@")


@dataclass(frozen=True, kw_only=True)
class Range:
    """The values a number may take; stands in the field's annotation, next to its type."""

    ge: float = -math.inf
    gt: float | None = None
    le: float = math.inf
    lt: float | None = None
    works: float
    """a value to name in the message when the given one is refused"""

    def allows(self, value: float) -> bool:
        """False for anything outside, NaN included."""
        above = self.gt is None or value > self.gt
        below = self.lt is None or value < self.lt
        return self.ge <= value <= self.le and above and below

    def __str__(self) -> str:
        words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
        limits = [(word, getattr(self, name)) for name, word in words.items()]
        return " and ".join(
            f"{word} {limit:.12g}"
            for word, limit in limits
            if limit is not None and math.isfinite(limit)
        )


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def changed(config: Config) -> set[str]:
    """Names of the settings that are not their defaults."""
    return {field.name for field in fields(config) if getattr(config, field.name) != field.default}


def check_values(config: Config) -> None:
    """Raise UserError for the first setting whose value its annotation does not allow."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        _check_value(field.name, getattr(config, field.name), hints[field.name])


def _check_value(name: str, value: object, hint: object) -> None:
    if value is None:
        return
    items = value if isinstance(value, tuple) else (value,)
    for item in items:
        _check_text(name, item)
    for part in parts(hint):
        if isinstance(part, Range):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not part.allows(value):
                raise UserError(
                    f"{flag(name)} is {value!r}; it must be {part}; {part.works:g} works"
                )
        if get_origin(part) is Literal:
            for item in items:
                if item not in get_args(part):
                    choices = ", ".join(map(str, get_args(part)))
                    raise UserError(f"{flag(name)} is {item!r}; it must be one of {choices}")


def parts(hint: object) -> list[object]:
    """The hint and everything nested in it: members of unions, arguments, Annotated metadata."""
    if get_origin(hint) is Literal:
        return [hint]
    nested = [*get_args(hint), *getattr(hint, "__metadata__", ())]
    return [hint, *(part for argument in nested for part in parts(argument))]


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        return
    if _TOKEN.search(value):
        raise UserError(
            f"{flag(name)} seems to hold an access token, and settings are written to disk; "
            "put the token into the environment variable HF_TOKEN instead"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{flag(name)} is {value!r}, which is not valid UTF-8 text") from None
