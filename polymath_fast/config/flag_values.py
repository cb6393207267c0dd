"""Whether what is written behind a flag can be read as what the flag takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Literal, get_args, get_origin

from polymath_fast.config.ranges import Range, parts
from polymath_fast.errors import UserError


def refuse_unreadable(words: Sequence[str], hints: Mapping[str, object]) -> None:
    """Raise UserError for the first value in `words` that is of another kind than its flag's.

    `hints` are the annotations of all settings. The parser would refuse it, too, but knows neither
    the rule nor a value that works.
    """
    if {"-h", "--help"} & set(words):
        return
    for flag, values in given(words):
        name = flag[2:].replace("-", "_")
        if not flag:
            raise UserError(f"{values[0]!r} belongs to no flag; see --help for what there is")
        if name in hints:
            _check(flag, values, parts(hints[name]))
        elif values:
            raise UserError(f"{flag} takes no value, but {values[0]!r} follows; leave that out")


def given(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Every flag with its values, read the way the parser reads them; "" for what is no flag's:
    it stands before the first, or behind a value that "=" joins to its flag."""
    flag, values = "", []
    for word in words:
        if word.startswith("--"):
            if flag or values:
                yield flag, values
            flag, equals, value = word.partition("=")
            values = []
            if equals:
                yield flag, [value]
                flag = ""
        else:
            values.append(word)
    if flag or values:
        yield flag, values


def joined(words: Sequence[str], hints: Mapping[str, object]) -> list[str]:
    """`words` with values that begin with a hyphen, such as the answer -x, joined to their flags:
    standing alone they would look like flags to the parser.

    >>> joined(["--answer", "-x", "--seed", "3"], {"answer": str, "seed": int})
    ['--answer=-x', '--seed', '3']
    """
    found: list[str] = []
    for word in words:
        flag = found[-1] if found and found[-1].startswith("--") else ""
        kinds = parts(hints.get(flag[2:].replace("-", "_"), bool))
        takes_one = bool not in kinds and not any(get_origin(kind) is tuple for kind in kinds)
        if takes_one and word.startswith("-") and word[:2] != "--" and word != "-h":
            found[-1] = f"{flag}={word}"
        else:
            found.append(word)
    return found


def _check(flag: str, values: list[str], kinds: Sequence[object]) -> None:
    if bool in kinds:
        if values:
            raise UserError(
                f"{flag} takes no value, but {values[0]!r} follows; it is on as it stands, and "
                f"--no-{flag[2:]} is off"
            )
        return
    works = next((f"{kind.works:g}" for kind in kinds if isinstance(kind, Range)), None)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    example = f"; {works or choices[0]} works" if works or choices else ""
    several = any(get_origin(kind) is tuple for kind in kinds)
    if not several and len(values) != 1:
        found = f"has {len(values)} ({' '.join(values)})" if values else "has none"
        raise UserError(f"{flag} takes one value, but {found}{example}")
    for value in values:
        if value == "None" and NoneType in kinds:
            continue
        if choices and value not in choices:
            named = ", ".join(map(str, choices))
            raise UserError(f"{flag} is {value!r}; it must be one of {named}{example}")
        for kind, rule in ((int, "a whole number"), (float, "a number")):
            if kind in kinds and not _reads(kind, value):
                raise UserError(f"{flag} is {value!r}; it must be {rule}{example}")


def _reads(kind: type, value: str) -> bool:
    try:
        kind(value)
    except ValueError:
        return False
    return True
