"""An engine behind a socket, served by a thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polymath_fast.errors import EngineError, UserError
from polymath_fast.processes.channel import Channel
from polymath_fast.processes.child import Child
from polymath_fast.rollout import engine_process
from polymath_fast.rollout.host_memory import HostMemory
from polymath_fast.rollout.remote_engine import IpcSync, RemoteEngine
from polymath_fast.rollout.types import Completion, Drawn, Request, SamplingOptions

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
        self.remote._shares_gpu = False

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


def small_model() -> nn.Module:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)).bfloat16()
    model[1].weight = model[0].weight
    return model


ENDLESS = [Request(prompt_ids=[9], n=10**9)]
