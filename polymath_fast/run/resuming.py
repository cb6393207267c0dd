"""Which checkpoint --resume means."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from polymath_fast import checkpoint
from polymath_fast.checkpoint import FOLDER, Checkpoint
from polymath_fast.errors import UserError
from polymath_fast.folders import kinds, manifest, step_folders


def resume(
    option: str, run_dir: Path, *, on_skip: Callable[[Path, str], None]
) -> Checkpoint | None:
    """The checkpoint that --resume means: "auto" is the newest of `run_dir`, or None when it has
    none yet; anything else is the path of a run folder or of one checkpoint, which must exist."""
    if option == "auto":
        return find(run_dir, on_skip=on_skip)
    found = find(_path(option), on_skip=on_skip)
    if found is None:
        raise _nothing_to_resume(option)
    return found


def require_something(option: str | None) -> None:
    """Raise UserError if --resume names no place of a checkpoint, before anything is written."""
    if option not in (None, "auto") and not _candidates(_path(option)):
        raise _nothing_to_resume(option)


def _nothing_to_resume(option: str) -> UserError:
    return UserError(
        f"--resume {option} is neither auto, nor a run folder with a checkpoint, nor a checkpoint; "
        "auto works for the run of --output-dir, and for any a path such as runs/first or "
        f"runs/first/{FOLDER}/step_000050"
    )


def go_back(option: str, run_dir: Path, found: Checkpoint) -> None:
    """Where --resume names one checkpoint of the run's own folder, delete the later ones: a future
    that it leaves, whose rows of metrics go, too. Else the next `--resume auto` would take them."""
    if found.path.resolve() == _path(option).resolve():
        root = Path(run_dir) / FOLDER
        if found.path.resolve().parent == root.resolve():
            step_folders.forget_after(root, found.step)


def _path(option: str) -> Path:
    return Path(os.path.expanduser(option))


def find(path: Path | str, *, on_skip: Callable[[Path, str], None]) -> Checkpoint | None:
    """The newest checkpoint of a run folder that verifies, or None when the run has saved none.

    `path` may also be one checkpoint; the ones before it stand in when it is torn. `on_skip(path,
    reason)` is called for every torn one. Raises UserError when all of them are torn, and for one
    that may be whole but cannot be read now: to go on before it would be to lose it.
    """
    candidates = _candidates(Path(path))
    for step, folder in reversed(candidates):
        try:
            return checkpoint.load(folder, step)
        except manifest.UnreadableFolder as error:
            earlier = [path for number, path in candidates if number < step]
            raise _unknown(folder, earlier, error) from error
        except manifest.TornFolder as error:
            on_skip(folder, str(error))
    if candidates:
        raise UserError(
            f"--resume {path}: none of its {len(candidates)} checkpoint(s) is intact; start again "
            "in a new --output-dir"
        )
    return None


def _unknown(folder: Path, earlier: list[Path], error: manifest.UnreadableFolder) -> UserError:
    instead = f", or go back for good with --resume {earlier[-1]}" if earlier else ""
    return UserError(
        f"{folder} may be a good checkpoint, but {error}: make it readable and resume again"
        f"{instead}"
    )


def _candidates(path: Path) -> list[tuple[int, Path]]:
    """(step, folder) of a run's checkpoints, oldest first; up to `path` where it is one of them."""
    named = step_folders.STEP.fullmatch(path.name)
    if not (named and kinds.is_folder(path)):
        return step_folders.steps(path / FOLDER)
    return [item for item in step_folders.steps(path.parent) if item[0] <= int(named[1])]
