"""What tests of samplers in other processes share."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from served_engine import Running


@pytest.fixture
def running() -> Iterator[Running]:
    made = Running()
    yield made
    made.remote.close()
    assert not made.thread.is_alive()
    assert all(engine.closed for engine in made.engines)


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    pair = socket.socketpair()
    yield pair
    for one in pair:
        one.close()
