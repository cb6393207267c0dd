"""The step_N folders of a run: how one gets its name, and how old ones go.

Names are given by rename, so a folder called step_N is whole at every moment; whatever is being
written, replaced or deleted is called tmp_*.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import uuid
from pathlib import Path

from polymath_fast.folders import kinds, manifest

STEP = re.compile(r"step_(\d+)")
_ASIDE = re.compile(r"tmp_(\d+)_old")


def temporary(root: Path, step: int) -> Path:
    """A name of its own for a checkpoint that is being written; not created."""
    return root / f"tmp_{step:06d}_{uuid.uuid4().hex[:8]}"


def publish(finished: Path, step: int) -> Path:
    """Give the finished folder its name; returns its new path.

    An older checkpoint of that name (a torn one, or one of an abandoned future) is moved aside
    first, because a rename cannot replace a full folder.
    """
    final = finished.with_name(f"step_{step:06d}")
    aside = finished.with_name(f"tmp_{step:06d}_old")
    if kinds.exists(final):
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    try:
        finished.rename(final)
        manifest.fsync(final.parent)
    except OSError:
        if kinds.exists(aside) and not kinds.exists(final):
            aside.rename(final)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    return final


def rotate(root: Path, step: int, keep: int) -> None:
    """Keep the newest `keep` complete checkpoints up to `step`; torn ones do not count, and those
    between them that the disk cannot read now stay without being counted."""
    kept = 0
    for number, folder in reversed(steps(root)):
        complete = _complete(folder) if number <= step and kept < keep else False
        if complete:
            kept += 1
        elif complete is not None:
            _remove(folder)


def forget_after(root: Path, step: int) -> None:
    """Delete the checkpoints past `step`."""
    for number, folder in steps(root):
        if number > step:
            _remove(folder)


def set_aside(folder: Path) -> None:
    """A torn checkpoint keeps what it holds under a name that counts for nothing: what is found
    out by reading all of it would else be forgotten, and the last good one go in its favour."""
    number = 1
    while kinds.exists(free := folder.with_name(f"torn_{folder.name}_{number}")):
        number += 1
    with contextlib.suppress(OSError):
        folder.rename(free)


def _remove(folder: Path) -> None:
    """Delete a checkpoint; a kill in the middle must not leave half of one under its name."""
    doomed = folder.with_name(f"tmp_{folder.name}_{uuid.uuid4().hex[:8]}")
    # One that cannot be deleted takes room and does no other harm: the new one is saved already.
    with contextlib.suppress(OSError):
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _complete(folder: Path) -> bool | None:
    """None when the disk does not tell."""
    try:
        manifest.verify(folder, hashes=False)
    except manifest.UnreadableFolder:
        return None
    except manifest.TornFolder:
        return False
    return True


def steps(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint below `root`, oldest first."""
    if not kinds.is_folder(root):
        return []
    named = ((STEP.fullmatch(path.name), path) for path in root.iterdir())
    return sorted((int(match[1]), path) for match, path in named if match and _is_folder(path))


def _is_folder(path: Path) -> bool:
    try:
        return kinds.is_folder(path)
    except OSError:  # it is there, and whoever opens it gets the reason
        return True


def sweep(root: Path) -> list[Path]:
    """Remove what killed saves left behind; call it only while holding the folder's RunLock.

    A checkpoint that a kill caught between being moved aside and being replaced gets its name back.
    """
    leftovers = sorted(root.glob("tmp_*"))
    for path in leftovers:
        aside = _ASIDE.fullmatch(path.name)
        final = path.with_name(f"step_{aside[1]}") if aside else path
        if kinds.exists(final):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(final)
    return leftovers
