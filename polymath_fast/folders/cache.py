"""Folders that are built once in the user's cache and then shared by all runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from polymath_fast.errors import UserError
from polymath_fast.folders import kinds, manifest


def cache_dir() -> Path:
    """$POLYMATH_FAST_CACHE, else polymath_fast in $XDG_CACHE_HOME, else in ~/.cache."""
    own = os.environ.get("POLYMATH_FAST_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser().absolute() / "polymath_fast"


def build_once(
    name: str,
    build: Callable[[Path], None],
    *,
    hashes: bool = True,
    notify: Callable[[str], None] = print,
) -> Path:
    """The folder `name` of the cache, built by `build(empty_folder)` if it is missing or damaged.

    The folder appears whole, under a lock, so processes that ask at the same time build it once and
    one that is killed leaves nothing that looks finished. Every call verifies the manifest, with
    `hashes` also every byte; a damaged folder is said aloud and built again. Raises UserError when
    the cache cannot be written.
    """
    folder = cache_dir() / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return _build_once(folder, build, hashes, notify)
    except OSError as error:
        raise UserError(
            f"the cache folder {folder.parent} cannot be used ({error.strerror or error}); make "
            "room there, or set POLYMATH_FAST_CACHE to a folder that can be written"
        ) from error


def _build_once(
    folder: Path, build: Callable[[Path], None], hashes: bool, notify: Callable[[str], None]
) -> Path:
    # A dependency of torch: imported here so that reading settings and data does not need it.
    from filelock import FileLock

    if _is_good(folder, hashes, notify):
        return folder
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        # Whoever held the lock before may have built it meanwhile.
        if _is_good(folder, hashes, lambda _: None):
            return folder
        partial = folder.with_name(f".{folder.name}.partial")
        for left_over in (partial, folder):
            if kinds.exists(left_over):
                shutil.rmtree(left_over)
        partial.mkdir()
        try:
            build(partial)
            manifest.write(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _is_good(folder: Path, hashes: bool, notify: Callable[[str], None]) -> bool:
    if not kinds.is_folder(folder):
        return False
    try:
        manifest.verify(folder, hashes=hashes)
    except manifest.TornFolder as error:
        notify(f"{folder} is damaged ({error}); building it again")
        return False
    return True
