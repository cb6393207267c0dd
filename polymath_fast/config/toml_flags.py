"""Configuration files as flags: one parser then checks both, with one style of message."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import get_args, get_origin

from polymath_fast.config.flag_values import given
from polymath_fast.errors import UserError
from polymath_fast.folders import lookup

PRESETS = Path(__file__).parents[1] / "presets"


def values_of(flag: str, args: Sequence[str]) -> list[str]:
    """Everything given for `flag` in `args`, in order.

    >>> values_of("--config", ["--seed", "1", "--config", "a", "b", "--config=c"])
    ['a', 'b', 'c']
    """
    return [value for name, values in given(args) if name == flag for value in values]


def refuse_unknown(
    args: Sequence[str], known: Iterable[str], prog: str = "python -m polymath_fast.train"
) -> None:
    """Raise UserError for a word in `args` that looks like a flag and is none, naming the nearest.

    The parser would refuse it too, but names a flag for some spellings only.
    """
    names = [*known, "help"]
    for arg in args:
        name = arg[2:].partition("=")[0].replace("-", "_")
        if arg.startswith("--") and name.removeprefix("no_") not in names:
            raise UserError(f"unknown flag {arg.partition('=')[0]}. {_nearest(name, names, prog)}")


def find(name: str) -> Path:
    """The file behind a value of --config: a path, or the name of a shipped preset."""
    lookup.require("--config", name)
    preset = PRESETS / f"{name}.toml"
    if "/" not in name and preset.is_file():
        return preset
    if Path(name).is_file():
        return Path(name)
    known = sorted(path.stem for path in PRESETS.glob("*.toml"))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"perhaps you meant {near[0]}" if near else f"presets are {', '.join(known)}"
    raise UserError(f"--config {name}: there is neither a file nor a preset of that name; {hint}")


def read(path: Path, kinds: Mapping[str, object]) -> list[str]:
    """Read a TOML file as flags; `kinds` maps the settings that exist to their types.

    Raises UserError, naming the file, for what is no setting or cannot be written as a flag.
    """
    try:
        table = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    return [word for key, value in table.items() for word in _words(path, key, value, kinds)]


def _words(path: Path, key: str, value: object, known: Mapping[str, object]) -> list[str]:
    name = key.replace("-", "_")
    if isinstance(value, dict) and name not in known:
        _refuse_section(path, key, value, known)
    if name not in known:
        raise UserError(f"{path}: unknown key {key!r}. {_nearest(name, known)}")
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool) != (known[name] is bool):
        rule = "true or false, without quotes" if known[name] is bool else "not true or false"
        raise UserError(f"{path}: {key} is {value!r}; it must be {rule}")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    if isinstance(value, list):
        if not _takes_list(known[name]):
            raise UserError(f"{path}: {key} is the list {value!r}; it must be a single value")
        words = [_word(path, key, item) for item in value]
        for word in words:
            if word.startswith("--"):
                raise UserError(f"{path}: {key} holds {word!r}; a value cannot begin with '--'")
        return [flag, *words]
    return [f"{flag}={_word(path, key, value)}"]


def _takes_list(kind: object) -> bool:
    return any(get_origin(part) is tuple for part in (kind, *get_args(kind)))


def _word(path: Path, key: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(
            f"{path}: {key} holds {value!r} ({type(value).__name__}); "
            "write a text, a number, true or false, or a list of texts or numbers"
        )
    return str(value)


def _refuse_section(path: Path, section: str, table: dict, known: Mapping[str, object]) -> None:
    """Settings are flat; a section's name would mean nothing, so it is refused with the way out."""
    for key in table:
        name = key.replace("-", "_")
        where = f"{path}: [{section}] {key}"
        if name not in known and not isinstance(table[key], dict):
            raise UserError(f"{where}: unknown key. {_nearest(name, known)}")
    for key, value in table.items():
        if isinstance(value, dict):
            _refuse_section(path, f"{section}.{key}", value, known)
    raise UserError(
        f"{path}: section [{section}] is not known; settings are not nested: delete that line and "
        "keep the keys below it at the top of the file"
    )


def _nearest(name: str, known: Iterable[str], prog: str = "python -m polymath_fast.train") -> str:
    near = difflib.get_close_matches(name.rpartition(".")[2], sorted(known), n=1, cutoff=0.5)
    if near:
        return f"Perhaps you meant --{near[0].replace('_', '-')}"
    return f"{prog} --help lists them all"
