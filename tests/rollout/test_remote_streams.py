"""Streams of an engine behind a socket that are closed, aborted or interrupted."""

from __future__ import annotations

import socket
import time
from contextlib import closing

import pytest
from served_engine import ENDLESS, SAMPLING, Running, small_model

from polymath_fast.errors import EngineError
from polymath_fast.rollout.types import Request


def test_a_closed_stream_is_aborted_and_the_next_request_gets_its_own_answer(
    running: Running,
) -> None:
    engine, model = running.start(), small_model()
    engine.weights.attach(model)
    for version in (1, 2, 3):
        stream = engine.stream(ENDLESS, SAMPLING)
        assert [next(stream)[:2] for _ in range(version)] == [(0, i) for i in range(version)]
        stream.close()
        assert len(running.engines[0].aborted_at) == version
        # weights and completions, whatever was still on its way
        engine.weights.push(model.named_parameters(), version)
        (completion,) = engine.generate([version], 1, SAMPLING)
        assert completion.token_ids[0] == version == completion.weight_version
    assert max(running.engines[0].aborted_at) < 10**6
    engine.sleep()


def test_a_consumer_that_fails_leaves_a_usable_engine(running: Running) -> None:
    engine = running.start()
    with pytest.raises(ZeroDivisionError), closing(engine.stream(ENDLESS, SAMPLING)) as stream:
        for drawn in stream:
            assert 6 // (2 - drawn.index)
    assert engine.generate([3], 1, SAMPLING)[0].token_ids[0] == 3


def test_closing_what_has_ended_there_aborts_nothing_later(running: Running) -> None:
    """The word to stop arrives when the process is done: it must not end the next stream."""
    engine = running.start()
    stream = engine.stream([Request(prompt_ids=[1], n=2)], SAMPLING)
    next(stream)
    while b'"end"' not in engine._channel._socket.recv(2**16, socket.MSG_PEEK):
        time.sleep(0.001)
    stream.close()
    for _ in range(3):
        assert len(list(engine.stream([Request(prompt_ids=[1], n=2)], SAMPLING))) == 2
    assert running.engines[0].aborted_at == []


def test_an_engine_that_cannot_abort_says_so(running: Running) -> None:
    engine = running.start()
    running.engines[0].fails_to_abort = True
    stream = engine.stream(ENDLESS, SAMPLING)
    next(stream)
    with pytest.raises(EngineError, match="lost what it aborted"):
        stream.close()
    with pytest.raises(EngineError, match="still at work on what was broken off"):
        engine.generate([1], 1, SAMPLING)


def test_an_interrupted_wait_is_not_taken_up_by_the_next_request(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = running.start(), small_model()
    engine.weights.attach(model)
    stream = engine.stream([Request(prompt_ids=[1], n=2)], SAMPLING)
    next(stream)

    def interrupted(*kinds: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine._channel, "receive", interrupted)
        next(stream)
    for use in (engine.sleep, lambda: engine.weights.push(model.named_parameters(), 1)):
        with pytest.raises(EngineError, match="still at work on what was broken off"):
            use()
