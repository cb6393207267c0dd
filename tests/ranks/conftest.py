"""What tests of several processes share."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from polymath_fast.processes.channel import Channel
from polymath_fast.ranks import Leader, Member, Ranks


@pytest.fixture
def three(tmp_path: Path) -> Iterator[list[Ranks]]:
    """A leader and two members, all in this process; threads may play them."""
    pairs = [socket.socketpair() for _ in range(2)]
    children = [SimpleNamespace(channel=Channel(ours, 20)) for ours, _ in pairs]
    members = [
        Member(Channel(theirs, 20), i + 1, 3, tmp_path, "cpu")
        for i, (_, theirs) in enumerate(pairs)
    ]
    yield [Leader(children, 3, tmp_path, "cpu"), *members]
    for pair in pairs:
        for end in pair:
            end.close()
