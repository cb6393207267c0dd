"""A process that `launch` started: the same run, on another device."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from polymath_fast.errors import EngineError, UserError
from polymath_fast.processes.child import inherited
from polymath_fast.ranks.ranks import Member


class Invitation(NamedTuple):
    """What a member is told of the run that it joins."""

    ranks: Member
    run_dir: Path
    checkpoint: tuple[Path, int] | None
    """where it goes on, and the step; None: at the beginning"""


def main(descriptor: int) -> int:
    """Run on an inherited socket; the leader hears what went wrong, and says it."""
    channel = inherited(descriptor)
    message = channel.receive("start")
    if message["cores"]:
        os.sched_setaffinity(0, message["cores"])  # before torch is imported, and counts them
    from polymath_fast.train import train

    folder = Path(message["folder"])
    ranks = Member(channel, message["rank"], message["size"], folder, message["device"])
    saved = message["checkpoint"]
    checkpoint = (Path(saved[0]), saved[1]) if saved else None
    try:
        invitation = Invitation(ranks, Path(message["run_dir"]), checkpoint)
        return train(_settings(message["config"]), invitation)
    except (UserError, EngineError) as error:
        channel.fail(error)
        return 1
    finally:
        ranks.close()


def _settings(values: Mapping[str, Any]) -> Any:
    from polymath_fast.config import Config

    return Config(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
