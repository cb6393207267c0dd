"""Both ends of a set of weights that is shared: messages, order, refusals, noise and silence."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shared_weights import weights_on

from polymath_fast.errors import EngineError, UserError
from polymath_fast.processes.channel import MAX_MESSAGE, Channel
from polymath_fast.rollout import ipc
from polymath_fast.rollout.host_memory import HostMemory
from polymath_fast.rollout.ipc import WeightReceiver, WeightSender


class Noted(HostMemory):
    """Notes what happens to its own event, 1, and to the other's, 2."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def new_event(self) -> int:
        return 1

    def open_event(self, handle: bytes) -> int:
        return 2

    def record(self, event: int) -> None:
        self.calls.append(f"record {event}")

    def wait(self, event: int) -> None:
        self.calls.append(f"wait {event}")


def together(learner: Callable[[], None], engine: Callable[[], None]) -> list[BaseException]:
    """Run both, one in a thread; what they raised."""
    raised: list[BaseException] = []

    def run(part: Callable[[], None]) -> None:
        try:
            part()
        except (UserError, EngineError, RuntimeError) as error:
            raised.append(error)

    thread = threading.Thread(target=run, args=(engine,))
    thread.start()
    run(learner)
    thread.join(20)
    assert not thread.is_alive()
    return raised


def test_versions_and_the_order_of_events(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = Noted(), Noted()
    weights, seen = weights_on(ours), []

    def learner() -> None:
        sender = WeightSender(Channel(sockets[0], 10), weights, ours)
        for version in (0, 1, 5, 5):
            for weight in weights.values():
                weight.fill_(version)
            sender.push(version)
        sender.close()

    def engine() -> None:
        receiver = WeightReceiver(Channel(sockets[1], 10), theirs)
        for _ in range(4):
            version = receiver.wait()
            seen.append((version, {n: t.unique().tolist() for n, t in receiver.tensors.items()}))
            receiver.taken()
        assert receiver.tensors["b"].shape == (4, 16) and receiver.version == 5
        receiver.close()

    assert together(learner, engine) == []
    assert seen == [(v, {"a": [v], "b": [v], "c": [v]}) for v in (0.0, 1.0, 5.0, 5.0)]
    # 1: an event of one's own, 2: the other's; each records before the other waits
    assert ours.calls == ["record 1", "wait 2"] * 4
    assert theirs.calls == ["wait 2", "record 1"] * 4


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ({"protocol": 2}, "version 2 of the protocol"),
        ({"device": "another GPU"}, "on GPU another GPU, this engine runs on host memory"),
        ({"size": 8}, "learner's a lies outside its memory"),
        ({"offset": -8}, "outside its memory"),
        ({"places": {"a": [0, [2], "int8"]}}, "not understood.*int8"),
        ({"places": {"a": [1, [2], "float32"]}}, "a lies outside"),
        ({"places": [1]}, "not understood"),
        ({"memory": "AAAA"}, "the handle memory has 3 bytes"),
        ({"memory": 7}, "no handle as memory"),
    ],
)
def test_an_offer_that_cannot_be_taken_is_refused_on_both_sides(
    sockets: tuple[socket.socket, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
    patch: dict[str, Any],
    message: str,
) -> None:
    driver = HostMemory()
    weights = weights_on(driver)
    send = Channel.send

    def changed(self: Channel, kind: str, **content: Any) -> None:
        send(self, kind, **(content | patch if kind == "weights" else content))

    monkeypatch.setattr(Channel, "send", changed)
    raised = together(
        lambda: WeightSender(Channel(sockets[0], 10), weights, driver),
        lambda: WeightReceiver(Channel(sockets[1], 10), driver),
    )
    assert len(raised) == 2
    for error in raised:
        with pytest.raises((UserError, EngineError), match=message):
            raise error


def test_memory_that_cannot_be_shared_is_refused(
    sockets: tuple[socket.socket, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = HostMemory()
    weights = weights_on(driver)
    channel = Channel(sockets[0], 10)
    with pytest.raises(ValueError, match="in 2 allocations"):
        WeightSender(channel, weights | {"d": torch.zeros(4)}, driver)
    with pytest.raises(ValueError, match="a is torch.float32"):
        WeightSender(channel, {"a": weights["a"].t()}, driver)
    with pytest.raises(ValueError, match="no weights"):
        WeightSender(channel, {}, driver)
    monkeypatch.setattr(driver, "shareable", lambda address: False)
    with pytest.raises(UserError, match="unset expandable_segments"):
        WeightSender(channel, weights, driver)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ended, or closed"),
        (b"\x05\x00", "ended, or closed"),
        (struct.pack("<I", MAX_MESSAGE + 1), "are the most"),
        (struct.pack("<I", 3) + b"abc", "no message of ours"),
        (struct.pack("<I", 2) + b"[]", "no message of ours"),
        (struct.pack("<I", 14) + b'{"kind":"what"', "no message of ours"),
        (struct.pack("<I", 15) + b'{"kind":"what"}', "sent 'what', expected weights"),
    ],
)
def test_noise_is_an_engine_error(
    sockets: tuple[socket.socket, socket.socket], data: bytes, message: str
) -> None:
    sockets[0].sendall(data)
    sockets[0].close()
    with pytest.raises(EngineError, match=message):
        Channel(sockets[1], 10).receive("weights")


def test_silence_is_an_engine_error(sockets: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(EngineError, match=r"silent for 0\.05 s"):
        Channel(sockets[1], 0.05).receive("version")


@pytest.mark.parametrize("version", [0, -1, "2", None])
def test_versions_never_fall(sockets: tuple[socket.socket, socket.socket], version: Any) -> None:
    driver = HostMemory()
    receiver = WeightReceiver.__new__(WeightReceiver)
    receiver._channel, receiver._driver, receiver.version = Channel(sockets[1], 10), driver, 1
    Channel(sockets[0], 10).send("version", version=version)
    with pytest.raises(EngineError, match="after version 1"):
        receiver.wait()


def test_no_driver_is_a_user_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    from polymath_fast.rollout.cuda_driver import CudaDriver

    with pytest.raises(UserError, match="no CUDA device 0"):
        CudaDriver()


def test_a_place_knows_its_size() -> None:
    assert ipc.Place(0, (2, 3), "bfloat16").size == 12
    assert ipc.Place(8, (), "float32").inside(12) and not ipc.Place(8, (2,), "float32").inside(12)
