"""Rows of problems from files, the package and the hub; what they mean is decided in samples."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polymath_fast.errors import UserError

SHIPPED = Path(__file__).parents[1] / "data"
_BUILT_IN = SHIPPED / "samples.jsonl"
_NOT_IN_NAMES = re.compile(r"[^\w.-]+")
Row = tuple[str, dict[str, Any]]
"""where a row stands (for messages), and its columns"""


def read_rows(dataset: str, split: str, asked: str | None = None) -> Iterator[Row]:
    """The rows of shipped:NAME, a .jsonl or .parquet file, or a hub id. Raises UserError.

    `asked` is the flag with its value that wants them, for messages: --dataset when left out.
    """
    rows = _open(dataset, split, asked or f"--dataset {dataset}")
    return rows if asked is None else _asked(asked, rows)


def _asked(asked: str, rows: Iterator[Row]) -> Iterator[Row]:
    try:
        for where, row in rows:
            yield f"{asked}: {where}", row
    except UserError as error:
        raise UserError(f"{asked}: {error}") from None


def _open(dataset: str, split: str, asked: str) -> Iterator[Row]:
    if on_hub(dataset):
        return _hub(dataset, split, asked)
    if dataset.startswith("shipped:"):
        return _shipped(dataset.removeprefix("shipped:"), asked)
    path = Path(dataset).expanduser()
    if path.suffix.lower() in (".jsonl", ".parquet"):
        if not path.is_file():
            what = "a folder" if path.is_dir() else "not there"
            raise UserError(f"{asked} is {what}; give a .jsonl or .parquet file")
        return _jsonl(path) if path.suffix.lower() == ".jsonl" else _parquet(path)
    raise UserError(
        f"{asked}: not a .jsonl or .parquet file; save it as jsonl with one "
        '{"problem": ..., "answer": ...} a line'
    )


def on_hub(dataset: str) -> bool:
    """Whether this is the id of a data set on the hub, which has splits."""
    path = Path(dataset).expanduser()
    file = path.suffix.lower() in (".jsonl", ".parquet")
    local = file or dataset.startswith(("shipped:", ".", "/", "~"))
    return not local and not path.exists()


def split_name(entry: str) -> tuple[str, str | None]:
    """("file.jsonl", "name") from file.jsonl=name; None where no name is given."""
    if "=" not in entry or Path(entry).expanduser().exists():
        return entry, None
    dataset, _, name = entry.rpartition("=")
    return dataset, name or None


def require_name(flag: str, dataset: str, name: str) -> None:
    """Raises UserError for the name of a set that would tear apart what it is reported under, such
    as eval/NAME/mean@1."""
    if not _NOT_IN_NAMES.search(name):
        return
    works = f"{dataset}={usable_name(name)}"
    if " " in works or not works.isprintable():
        works = repr(works)
    raise UserError(
        f"{flag}: the problems of {dataset!r} are called {name!r}, and a name must be made of "
        f"letters, digits, '.', '_' and '-'; {flag} {works} works"
    )


def usable_name(name: str) -> str:
    """`name` without what the name of a set may not hold.

    >>> usable_name("a/b c")
    'a_b_c'
    """
    return _NOT_IN_NAMES.sub("_", name).strip("_") or "held_out"


def held_out(dataset: str | None) -> str | None:
    """The shipped held-out problems that belong to a shipped sample, if there are any.

    >>> held_out("shipped:rectangle")
    'shipped:rectangle_held_out'
    """
    name = (dataset or "").removeprefix("shipped:")
    exists = dataset == f"shipped:{name}" and (SHIPPED / f"{name}_held_out.jsonl").is_file()
    return f"shipped:{name}_held_out" if exists else None


def _shipped(name: str, asked: str) -> Iterator[Row]:
    files = {path.stem: path for path in SHIPPED.glob("*.jsonl") if path != _BUILT_IN}
    if name in files:
        return _jsonl(files[name])
    samples = {row["name"]: (where, row) for where, row in _jsonl(_BUILT_IN)}
    if name in samples:
        return iter([samples[name]])
    known = [*samples, *sorted(files)]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"perhaps you meant shipped:{near[0]}" if near else f"there are {', '.join(known)}"
    raise UserError(f"{asked} is not shipped with polymath_fast; {hint}")


def _jsonl(path: Path) -> Iterator[Row]:
    """One JSON object a line; a byte order mark, CRLF line ends and blank lines do no harm."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    # Only \n ends a line: str.splitlines would also split inside texts, at U+2028 for example.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON ({error}); write one object a line") from None
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: a {type(row).__name__}, not an object; write "
                '{"problem": ..., "answer": ...}'
            )
        yield where, row


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not a complete parquet file ({error}); download or write it again"
        ) from None


def _hub(name: str, split: str, asked: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{asked}: no such file, and a hub id needs the package datasets; "
            "install it with: pip install 'polymath-fast[hub]'"
        ) from None
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{asked}, split {split}: cannot be loaded ({reason}); give a .jsonl or "
            ".parquet file, shipped:rectangle, or a hub id that can be reached"
        ) from None
    return ((f"{name}: row {number}", dict(row)) for number, row in enumerate(rows, start=1))
