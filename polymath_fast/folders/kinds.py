"""What is at a path, without guessing where the disk does not tell.

From Python 3.14 on, Path.is_file() and its like call a file missing when the disk cannot read it. A
checkpoint must not be deleted, nor a run's rows be begun anew, for an error that may pass.
"""

from __future__ import annotations

import errno
import stat
from pathlib import Path

_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def exists(path: Path) -> bool:
    """Raises OSError where the disk does not tell, as all of these do."""
    return _mode(path) is not None


def is_file(path: Path) -> bool:
    """Links are followed."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def is_folder(path: Path) -> bool:
    """Links are followed."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except ValueError:  # a zero byte: nothing has such a name
        return None
    except OSError as error:
        if error.errno in _NOTHING_THERE:
            return None
        raise
