"""wandb, trackio and TensorBoard behind one queue each, so that none can stop or slow a run.

Every tracker lives in a thread of its own, from import to the last upload. One that raises is
dropped after one warning; one that is slow loses rows, after one warning; a run never waits for it
longer than CLOSE_TIMEOUT at the end.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import re
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polymath_fast.errors import UserError

CLOSE_TIMEOUT = 10.0
QUEUE_SIZE = 1000
_SECRET_NAME = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
_URL_LOGIN = re.compile(r"://[^/\s@]+@")

Log = Callable[[int, Mapping[str, float]], None]
Say = Callable[[str], None]
Connect = Callable[[Path, Mapping[str, Any], Say], tuple[Log, Callable[[], None]]]


class Tracker:
    """One tracker by name; `say` shows a line to the user, from any thread.

    Raises UserError when the tracker's package is not installed.
    """

    def __init__(self, name: str, run_dir: Path, config: Mapping[str, Any], say: Say) -> None:
        if name not in CONNECT:
            raise UserError(f"--log-to {name}: unknown tracker; use one of {', '.join(CONNECT)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--log-to {name}: the package {name} is not installed; "
                f"pip install 'polymath-fast[{name}]', or leave the flag out "
                "(metrics.jsonl is always written)"
            )
        self.name = name
        self._say = say
        self._warned = False
        self._rows: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(QUEUE_SIZE)
        self._thread = threading.Thread(
            target=self._work, args=(run_dir, config), name=f"tracker-{name}", daemon=True
        )
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand a row over; returns at once."""
        try:
            self._rows.put_nowait((step, dict(metrics)))
        except queue.Full:
            self._warn_once("is too slow, rows are left out")

    def close(self) -> None:
        """Let the tracker finish, for CLOSE_TIMEOUT seconds at most."""
        try:
            self._rows.put(None, timeout=CLOSE_TIMEOUT)
            self._thread.join(CLOSE_TIMEOUT)
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._warn_once(f"did not finish within {CLOSE_TIMEOUT:.0f} s")

    def _work(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        rows = iter(self._rows.get, None)
        try:
            log, finish = CONNECT[self.name](run_dir, config, self._say)
            for row in rows:
                log(*row)
            finish()
        except (Exception, SystemExit) as error:
            self._warn_once(f"failed and is off from here on ({redact(repr(error))})")
            # An iterator that has seen the end stays at its end; else this empties the queue.
            for _ in rows:
                pass

    def _warn_once(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            self._say(f"warning: {self.name} {what}; training and metrics.jsonl go on")


def redact(text: str) -> str:
    """`text` without the values of secret-looking environment variables and logins in URLs."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 6:
            text = text.replace(value, "***")
    return _URL_LOGIN.sub("://***@", text)


def _connect_wandb(
    run_dir: Path, config: Mapping[str, Any], say: Say
) -> tuple[Log, Callable[[], None]]:
    import wandb

    # Silent also means that a missing API key is an error here, not a question on the terminal.
    settings = wandb.Settings(silent=True, console="off", disable_code=True, disable_git=True)
    wandb.setup(settings)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "polymath-fast"),
        name=run_dir.name,
        id=_run_id(run_dir),
        resume="allow",
        dir=str(run_dir),
        config=dict(config),
        settings=settings,
    )
    if run.url:
        say(f"wandb: {run.url}")
    return (lambda step, metrics: run.log(dict(metrics), step=step)), run.finish


def _connect_trackio(
    run_dir: Path, config: Mapping[str, Any], say: Say
) -> tuple[Log, Callable[[], None]]:
    import trackio

    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", "polymath-fast"),
        name=f"{run_dir.name}-{_run_id(run_dir)}",
        resume="allow",
        config=dict(config),
        embed=False,
    )
    return (lambda step, metrics: run.log(dict(metrics), step=step)), run.finish


def _connect_tensorboard(
    run_dir: Path, config: Mapping[str, Any], say: Say
) -> tuple[Log, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run_dir / "tensorboard"))
    writer.add_text("config", "\n".join(f"    {key} = {value!r}" for key, value in config.items()))

    def log(step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return log, writer.close


def _run_id(run_dir: Path) -> str:
    """The same random name for a run and its continuations."""
    path = run_dir / "tracker_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8], encoding="ascii")
    return path.read_text(encoding="ascii")


CONNECT: dict[str, Connect] = {
    "wandb": _connect_wandb,
    "trackio": _connect_trackio,
    "tensorboard": _connect_tensorboard,
}
