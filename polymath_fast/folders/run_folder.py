"""The folder of a run: whose it is, who writes in it now, how to go on in it.

A folder belongs to a run when it holds LOCK_FILE. The lock itself is the kernel's (flock), so it
dies with the process that holds it: a killed run leaves a file, never a locked folder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from polymath_fast.errors import UserError
from polymath_fast.folders import asking, kinds

LOCK_FILE = ".polymath_fast.lock"
# Left by a run that ended before its first step: nothing is lost by starting over.
_NOTHING_YET = {LOCK_FILE, "config.toml"}
_ROWS = {"metrics.jsonl", "completions.jsonl"}  # made empty before the first step
_held: set[int] = set()


class RunLock:
    """`with RunLock(run_dir):` makes this process the only one that writes in the run folder.

    The folder must exist. Raises UserError naming the other process when the folder is in use.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = Path(run_dir) / LOCK_FILE
        self._descriptor: int | None = None

    def acquire(self) -> RunLock:
        """Take the lock at once or raise; never waits."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unusable(self.path.parent, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                warnings.warn(
                    f"{self.path.parent}: this filesystem has no locks ({error.strerror}); "
                    "make sure that no other run writes in the same output folder",
                    stacklevel=2,
                )
                return self
            raise UserError(_in_use(self.path.parent, owner)) from None
        owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, owner.encode(), 0)
        except OSError as error:
            os.close(descriptor)
            raise _unusable(self.path.parent, error) from error
        self._descriptor = descriptor
        _held.add(descriptor)
        return self

    def release(self) -> None:
        """Give the folder back; the file stays, as the mark of a run."""
        if self._descriptor is not None:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _drop_in_child() -> None:
    # A forked worker shares the lock; it must not keep the folder locked once the run is gone.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)


@contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """A disk that refuses what is written in the block becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise _unusable(run_dir, error) from error


def prepare(output_dir: str | None, *, resume: str | None) -> Path:
    """Make the output folder and return it; None means runs/YYYYmmdd-HHMMSS, with a number behind
    it where that is taken: two runs may start in one second, and clocks go back.

    Refuses (UserError) what cannot be a run's folder: a file, a folder that cannot be written, one
    with foreign files, and one with an earlier run's files unless `resume` says to go on in it.
    Writes nothing in a folder that it refuses.
    """
    run_dir = Path(output_dir or time.strftime("runs/%Y%m%d-%H%M%S"))
    try:
        run_dir = run_dir.expanduser()
        if output_dir is None:
            return _make_new(run_dir)
        if kinds.exists(run_dir) and not kinds.is_folder(run_dir):
            raise UserError(
                f"--output-dir {run_dir} is a file; it must be a folder that is new, empty or an "
                f"earlier run's, for example {run_dir}-run"
            )
        run_dir.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in run_dir.iterdir()}
        _check_kinds(run_dir)
        empty = {name for name in names & _ROWS if not (run_dir / name).stat().st_size}
        empty |= {name for name in names if name.startswith(".config.toml.")}  # of a killed start
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # the last of ~ without a home
        raise _unusable(run_dir, error) from error
    if reason := _taken(run_dir, names, empty, resume):
        name = shlex.quote(str(_free_name(run_dir)))
        raise UserError(f"{reason} choose a folder that is new or empty, e.g. --output-dir {name}")
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise _unusable(run_dir, PermissionError(errno.EACCES, "Permission denied"))
    return run_dir


def _check_kinds(run_dir: Path) -> None:
    """What a run is going to write there must not be something else: it would be noticed last."""
    for name, folder in (*dict.fromkeys(_ROWS, False).items(), ("checkpoints", True)):
        path = run_dir / name
        if kinds.exists(path) and kinds.is_folder(path) != folder:
            kind = "file" if folder else "folder"
            raise UserError(f"{path} is a {kind}: move it, or choose another --output-dir")


def _make_new(run_dir: Path) -> Path:
    while True:
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except FileExistsError:
            run_dir = _free_name(run_dir)


def _taken(run_dir: Path, names: set[str], empty: set[str], resume: str | None) -> str | None:
    """Why the run may not go on among the files `names`, some `empty`, or None."""
    folder = f"--output-dir {run_dir}"
    copied = {"config.toml", "metrics.jsonl"} <= names
    if names and LOCK_FILE not in names and not copied:
        return f"{folder} holds files that are no run's ({_some(names)});"
    if not names - _NOTHING_YET - empty or resume == "auto":
        return None
    if resume is None:
        return f"{folder} holds an earlier run; add --resume auto to continue it, or"
    if not Path(resume).expanduser().resolve().is_relative_to(run_dir.resolve()):
        return f"{folder} holds another run than --resume {resume}, which would replace it;"
    return None


def resume_command(run_dir: Path) -> str:
    """The shell command that continues the run, quoted for names with spaces."""
    folder = _as_argument(run_dir)
    words = [
        *(_python(), "-m", "polymath_fast.train", "--config", f"{folder}/config.toml"),
        *("--output-dir", folder, "--resume", "auto"),
    ]
    return shlex.join(words)


def report_command(run_dir: Path) -> str:
    """The shell command that writes the report of a run."""
    return shlex.join([_python(), "-m", "polymath_fast.report", _as_argument(run_dir)])


def evaluate_command(checkpoint: Path) -> str:
    """The shell command that scores a checkpoint, asked as its run asked."""
    words = [_python(), "-m", "polymath_fast.evaluate", "--model", _as_argument(checkpoint)]
    return shlex.join([*words, *asking.as_flags(asking.as_trained(checkpoint))])


def _python() -> str:
    """What calls this interpreter: its name where a shell would find it by that, else its path."""
    if shutil.which("python") == sys.executable:
        return "python"
    path = os.path.relpath(sys.executable)
    return sys.executable if path.startswith("..") else path


def _as_argument(path: Path) -> str:
    return f"./{path}" if str(path).startswith("-") else str(path)


def _in_use(run_dir: Path, owner: bytes) -> str:
    try:
        content = json.loads(owner)
        who = f"pid {int(content['pid'])} on {content['host']}"
    except (ValueError, KeyError, TypeError):
        who = "pid unknown"
    return (
        f"--output-dir {run_dir}: output folder in use by another run ({who}); wait for it, stop "
        f"it, or choose another folder, for example {_free_name(run_dir)}"
    )


def _unusable(run_dir: Path, error: OSError | ValueError | RuntimeError) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(
        f"--output-dir {str(run_dir)!r} cannot be written ({reason}); it must be a folder where "
        "you may create files, for example runs/first"
    )


def _free_name(run_dir: Path) -> Path:
    if run_dir.name in ("", ".."):
        run_dir = run_dir / "run"
    number = 2
    while os.path.lexists(candidate := run_dir.with_name(f"{run_dir.name}-{number}")):
        number += 1
    return candidate


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")
