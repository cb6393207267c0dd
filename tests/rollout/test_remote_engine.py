"""An engine behind a socket: requests, weights in shared memory, and how it ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polymath_fast.errors import EngineError, UserError
from polymath_fast.processes.channel import Channel
from polymath_fast.processes.child import Child
from polymath_fast.rollout import build_engine, choose_weight_sync, engine_process
from polymath_fast.rollout.host_memory import HostMemory
from polymath_fast.rollout.remote_engine import IpcSync, RemoteEngine
from polymath_fast.rollout.types import Completion, Drawn, Request, SamplingOptions
from polymath_fast.rollout.wire import decode

LOGPROBS = [-0.1, -1e-300, 0.0, -0.30000000000000004]
SAMPLING = SamplingOptions(max_completion_length=4, temperature=0.6, seed=2**40)


class Engine:
    """Answers with what it was asked, and keeps a copy of the weights it was given."""

    def __init__(self, settings: dict[str, Any]) -> None:
        if settings["max_num_seqs"] == 0:
            raise UserError("--max-num-seqs 0: must be at least 1")
        self.weights = self
        self.version = 0
        self.copy: dict[str, Tensor] = {}
        self.aborted_at: list[int] = []
        self.closed = self.asleep = self.fails_to_abort = False

    def push(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.copy = {name: weight.clone() for name, weight in named_weights}
        self.version = version

    def verify(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, weight in named_weights:
            if not torch.equal(self.copy[name], weight):
                raise EngineError(f"{name} differs")

    def stream(
        self, requests: Sequence[Request], sampling: SamplingOptions, stopped: Callable[[], bool]
    ) -> Iterator[Drawn]:
        assert sampling == SAMPLING
        for number, request in enumerate(requests):
            if request.n == 3:
                raise EngineError("out of memory")
            for index in range(request.n):
                yield Drawn(number, index, self.complete(request, index))
                if stopped():
                    self.aborted_at.append(index)
                    if self.fails_to_abort:
                        raise EngineError("lost what it aborted")
                    return

    def complete(self, request: Request, index: int) -> Completion:
        made = Completion(
            token_ids=[*request.prompt_ids, 2**31 - 1],
            sampling_logprobs=LOGPROBS,
            finish_reason="stop",
            weight_version=self.version,
        )
        return request.begun[index].extended(made) if index < len(request.begun) else made

    def sleep(self) -> None:
        self.asleep = True

    def wake(self) -> None:
        self.asleep = False

    def close(self) -> None:
        self.closed = True


class Running:
    """`serve` in a thread, and a RemoteEngine that believes it talks to a process."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.engines: list[Engine] = []
        self.thread = threading.Thread(target=self._serve, args=(theirs,))
        self.thread.start()
        self.remote = RemoteEngine.__new__(RemoteEngine)
        self.remote._child = Child.__new__(Child)
        self.remote._child.process = self
        self.remote._child.channel = self.remote._channel = Channel(ours, 20)
        self.remote._makes_room = False

    def start(self, max_num_seqs: int = 4) -> RemoteEngine:
        settings = {"device": "cpu", "max_num_seqs": max_num_seqs}
        self.remote._ask("ready", "start", settings=settings)
        self.remote.weights = IpcSync(self.remote._channel, HostMemory())
        return self.remote

    def _serve(self, connection: socket.socket) -> None:
        def make(settings: dict[str, Any]) -> Engine:
            self.engines.append(Engine(settings))
            return self.engines[-1]

        with connection:
            engine_process.serve(Channel(connection, 20), make, engine_process.make_driver)

    def poll(self) -> int | None:
        return None if self.thread.is_alive() else 0

    def wait(self, timeout: float | None = None) -> None:
        self.thread.join(20)

    def kill(self) -> None:
        self.remote._channel.close()


@pytest.fixture
def running() -> Iterator[Running]:
    made = Running()
    yield made
    made.remote.close()
    assert not made.thread.is_alive()
    assert all(engine.closed for engine in made.engines)


def small_model() -> nn.Module:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)).bfloat16()
    model[1].weight = model[0].weight
    return model


def test_completions_come_back_as_they_were(running: Running) -> None:
    engine = running.start()
    groups = engine.generate_many([[1, 2], [3]], 2, SAMPLING)
    assert [[list(c.token_ids) for c in group] for group in groups] == [
        [[1, 2, 2**31 - 1]] * 2,
        [[3, 2**31 - 1]] * 2,
    ]
    (completion,) = engine.generate([7], 1, SAMPLING)
    assert completion.sampling_logprobs == LOGPROBS
    assert (completion.finish_reason, completion.weight_version) == ("stop", 0)
    engine.sleep()
    assert running.engines[0].asleep
    engine.wake()
    assert not running.engines[0].asleep


def test_an_engine_that_wakes_finds_the_memory_that_an_update_left(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's allocator keeps it in this process, where the other one cannot ask for it."""
    engine, emptied = running.start(), []
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: emptied.append(running.engines[0].asleep)
    )
    engine.sleep()
    engine.wake()
    assert not emptied
    engine._makes_room = True
    engine.sleep()
    engine.wake()
    engine.generate([7], 1, SAMPLING)
    assert emptied == [True, False]


def test_requests_and_unfinished_completions_travel_whole(running: Running) -> None:
    engine = running.start()
    begun = Completion(
        token_ids=[5], sampling_logprobs=[-0.25], finish_reason="aborted", weight_version=-4
    )
    request = Request(prompt_ids=[1], n=2, needed=1, begun=[begun])
    first, second = (each.completion for each in engine.stream([request], SAMPLING))
    assert first.spans == ((-4, 0), (0, 1)) and second.spans == ((0, 0),)
    assert (first.token_ids, first.sampling_logprobs[0]) == ([5, 1, 2**31 - 1], -0.25)


def test_an_engine_that_dies_in_between_has_given_what_had_finished(running: Running) -> None:
    engine = running.start()
    stream = engine.stream([Request(prompt_ids=[1], n=2), Request(prompt_ids=[1], n=3)], SAMPLING)
    assert [next(stream)[:2], next(stream)[:2]] == [(0, 0), (0, 1)]
    with pytest.raises(EngineError, match="the other process failed: out of memory"):
        next(stream)


ENDLESS = [Request(prompt_ids=[9], n=10**9)]


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


def test_weights_are_read_where_the_learner_writes_them(running: Running) -> None:
    engine, model = running.start(), small_model()
    before = model[0].weight.detach().clone()
    storage = engine.weights.attach(model)
    assert model[0].weight is model[1].weight and torch.equal(model[0].weight, before)
    assert model[0].weight.data_ptr() == storage.live.data_ptr()
    for version in (1, 2):
        storage.live.mul_(2)
        engine.weights.push(model.named_parameters(remove_duplicate=False), version)
        copy = running.engines[0].copy
        assert copy.keys() == {"0.weight", "1.weight"}
        assert all(torch.equal(weight, before * 2**version) for weight in copy.values())
        assert engine.generate([1], 1, SAMPLING)[0].weight_version == version
    engine.weights.verify(model.named_parameters())
    assert engine.weights.version == 2
    model[0].weight.data = before
    with pytest.raises(EngineError, match="0.weight of the learner no longer lies"):
        engine.weights.push(model.named_parameters(), 3)


def test_a_corrupted_weight_is_found(running: Running) -> None:
    engine, model = running.start(), small_model()
    engine.weights.attach(model)
    engine.weights.push(model.named_parameters(), 1)
    running.engines[0].copy["0.weight"].view(torch.int16)[3, 3] ^= 1
    with pytest.raises(EngineError, match="the other process failed: 0.weight differs"):
        engine.weights.verify(model.named_parameters())


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda r: r.start(max_num_seqs=0), UserError, "--max-num-seqs 0: must be"),
        (lambda r: r.start().generate([1], 3, SAMPLING), EngineError, "out of memory"),
        (lambda r: r.start()._ask("done", "dance"), EngineError, "sent 'dance', expected"),
        (lambda r: r.start()._ask("taken", "push"), EngineError, "'push' before any weights"),
        (lambda r: r.start().weights.push([], 1), EngineError, "call weights.attach"),
    ],
)
def test_what_goes_wrong_there_is_said_here(
    running: Running, use: Callable[[Running], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        use(running)


def test_ipc_means_an_engine_in_another_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        RemoteEngine, "__init__", lambda self, folder, **settings: asked.update(settings)
    )
    sizes = {"max_model_len": 9, "max_num_seqs": 3, "stop_token_ids": [1], "device": "cpu"}
    sizes |= {"dtype": "float32"}
    engine = build_engine("vllm", model_dir=tmp_path, policy=None, weight_sync="ipc", **sizes)
    assert isinstance(engine, RemoteEngine)
    assert asked.items() >= sizes.items() and "weight_sync" not in asked
    assert choose_weight_sync("ipc", "vllm")[0] == "ipc"
    with pytest.raises(UserError, match="--weight-sync ipc: the model is quantised"):
        choose_weight_sync("ipc", "vllm", quantization="fp8")


def test_the_process_ends_with_its_parent() -> None:
    code = (
        "import os, socket, subprocess, sys\n"
        "ours, theirs = socket.socketpair()\n"
        "command = [sys.executable, '-m', 'polymath_fast.rollout.engine_process']\n"
        "child = subprocess.Popen([*command, str(theirs.fileno())], pass_fds=[theirs.fileno()])\n"
        "print(child.pid, flush=True)\n"
        "input()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}/cmdline").is_file() and time.monotonic() < deadline:
        if not Path(f"/proc/{child}/cmdline").read_bytes():  # a zombie that nobody reaped yet
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize(
    "data",
    [[], ["AA", "", "stop", 0], ["", "!", "stop", [[0, 0]]], [1, 2, 3, 4], ["", "", "stop", []]],
)
def test_broken_completions_are_engine_errors(data: list[Any]) -> None:
    with pytest.raises(EngineError, match="sent no completion"):
        decode(data)
