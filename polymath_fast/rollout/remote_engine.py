"""vLLM in a process of its own, on weights that lie in the learner's memory.

A crash or an out-of-memory of the sampler leaves the learner whole. On one GPU the weights are
mapped once; an update is an event that orders the two processes' streams, and one copy launch on
the engine's side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymath_fast.errors import EngineError
from polymath_fast.learner.flat_storage import FlatStorage, trained
from polymath_fast.processes.channel import Channel
from polymath_fast.processes.child import Child
from polymath_fast.rollout import engine_process
from polymath_fast.rollout.ipc import Driver, WeightSender
from polymath_fast.rollout.streaming import StreamingEngine
from polymath_fast.rollout.types import Drawn, Request, SamplingOptions
from polymath_fast.rollout.wire import decode_drawn, encode_request


class IpcSync:
    """The learner's weights lie where the engine's process can read them."""

    name = "ipc"

    def __init__(self, channel: Channel, driver: Driver) -> None:
        self._channel = channel
        self._driver = driver
        self._sender: WeightSender | None = None
        self._addresses: dict[str, int] = {}
        self.version = 0

    def attach(self, model: nn.Module) -> FlatStorage:
        """Move the weights of `model` into memory that can be shared, and offer it.

        Raises UserError when the engine's process cannot take it.
        """
        storage = self._shared_storage(model)
        storage.adopt(model)
        weights = dict(model.named_parameters(remove_duplicate=False))
        with self._channel.request():
            self._channel.send("attach")
            self._sender = WeightSender(
                self._channel, {n: w.detach() for n, w in weights.items()}, self._driver
            )
        self._addresses = {name: weight.data_ptr() for name, weight in weights.items()}
        return storage

    def _shared_storage(self, model: nn.Module) -> FlatStorage:
        named = trained(model)
        dtype = next(iter(named.values())).dtype
        places, count = {}, 0
        for name, parameter in named.items():
            places[name] = (count, tuple(parameter.shape))
            count += parameter.numel()
        size = count * dtype.itemsize
        memory = self._driver.bytes_at(self._driver.allocate(size), size)
        return FlatStorage(memory.view(dtype), places)

    def push(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Tell the engine that the weights it maps are complete; it copies them on its side."""
        if self._sender is None:
            raise EngineError("no learner is attached to this engine: call weights.attach(model)")
        for name, weight in named_weights:
            if weight.data_ptr() != self._addresses.get(name):
                raise EngineError(
                    f"{name} of the learner no longer lies in the shared memory: its data was "
                    "replaced instead of being written in place"
                )
        with self._channel.request():
            self._channel.send("push")
            self._sender.push(version)
        self.version = version

    def verify(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Let the engine's process compare checksums of what it maps with what it samples from."""
        with self._channel.request():
            self._channel.send("verify")
            self._channel.receive("verified")


class RemoteEngine(StreamingEngine):
    """Samples with vLLM in a child process."""

    name = "vllm"

    def __init__(self, model_dir: Path, *, device: str, **settings: Any) -> None:
        """Start the process and wait until its engine is ready; it ends with the calling thread.

        Args:
            device: "cpu" or "cuda", which is the first visible device of both processes.
            settings: what `VllmEngine` takes.

        Raises:
            UserError, EngineError: what the engine raised at its start.
        """
        self._child = Child(engine_process.__name__)
        self._channel = self._child.channel
        self._shares_gpu = str(device).startswith("cuda")
        try:
            settings |= {"model_dir": str(model_dir), "device": device}
            self._ask("ready", "start", settings=settings)
            self.weights = IpcSync(self._channel, engine_process.make_driver(device))
        except BaseException:
            self.close()
            raise

    def stream(self, requests: Sequence[Request], sampling: SamplingOptions) -> Iterator[Drawn]:
        """The completions of all requests, as they finish; see `StreamingEngine.stream`.

        The process notices within one step of its engine that an iterator was closed, and then
        takes the next request.
        """
        asked = [encode_request(request) for request in requests]
        self._make_room()
        with self._channel.request():
            self._channel.send("stream", requests=asked, sampling=asdict(sampling))
            try:
                while (answer := self._channel.receive("drawn", "end"))["kind"] != "end":
                    yield decode_drawn(answer)
            except GeneratorExit:
                self._channel.send("abort")
                while self._channel.receive("drawn", "end")["kind"] != "end":
                    pass

    def sleep(self) -> None:
        """Let the engine give back what it was started to give back."""
        self._ask("done", "sleep")

    def wake(self) -> None:
        """Be ready to sample again."""
        self._make_room()
        self._ask("done", "wake")

    def close(self) -> None:
        """End the process; the learner's weights stay where they are."""
        self._child.close(ask="close")

    def _make_room(self) -> None:
        """The engine takes memory for a long prefill, and for its KV cache after it slept: what
        torch keeps of this process's update has to be the device's again, for the other process
        cannot ask for it."""
        if self._shares_gpu:
            torch.cuda.empty_cache()

    def _ask(self, answer: str, kind: str, **content: Any) -> dict[str, Any]:
        with self._channel.request():
            self._channel.send(kind, **content)
            return self._channel.receive(answer)
