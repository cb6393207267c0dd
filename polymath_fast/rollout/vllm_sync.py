"""Weight sync with a vLLM engine in this process: shared memory, or vLLM's own reload."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from polymath_fast.errors import EngineError
from polymath_fast.learner.flat_storage import FlatStorage
from polymath_fast.rollout import weights as weight_tools

if TYPE_CHECKING:
    from polymath_fast.rollout.vllm_loader import LiveWeights


class AliasSync:
    """The learner's parameters are views of the engine's: an update is there when it is stored.

    A push orders the streams and drops the prefix cache of the old weights; it moves no bytes.
    """

    name = "alias"

    def __init__(self, llm: object, weights: LiveWeights):
        self._llm = llm
        self._weights = weights
        self._bound: list[tuple[str, nn.Parameter, int]] = []
        device = weights.storage.live.device
        # vLLM may give the thread that starts it a stream of its own, and runs on that one.
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.version = 0

    def attach(self, model: nn.Module) -> FlatStorage:
        """Bind `model` to the engine's memory; see `weights.bind` for what it raises."""
        bound = weight_tools.bind(model, self._weights.storage)
        self._bound = [(name, param, param.data_ptr()) for name, param in bound]
        if self._stream is not None:  # the learner's own copy may have come from another stream
            torch.cuda.empty_cache()
        return self._weights.storage

    def push(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """`named_weights` are the attached model's, whose values the engine sees already."""
        if not self._bound:
            raise EngineError("no learner is attached to this engine: call weights.attach(model)")
        for name, param, address in self._bound:
            if param.data_ptr() != address:
                raise EngineError(
                    f"{name} of the learner no longer lies in the engine's memory: its data was "
                    "replaced instead of being written in place"
                )
        if self._stream is not None:
            with failures_named():
                self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._weights.changed()
        forget_prefixes(self._llm)
        self.version = version

    def verify(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Compare checksums of what the learner reads with those of what the engine reads."""
        weight_tools.compare(named_weights, self._weights.storage.views())


class ReloadSync:
    """vLLM's own in-place reload: works on every build, copies and repacks every weight."""

    name = "reload"

    def __init__(self, llm: object, weights: LiveWeights | None = None):
        """`weights`: the engine's, where they can be read back (see `verify`)."""
        self._llm = llm
        self._weights = weights
        self.version = 0

    def attach(self, model: nn.Module) -> None:
        """The learner keeps memory of its own."""

    def push(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand all weights to vLLM's loader and forget the prefix cache of the old ones."""
        weights = [(name, tensor.detach()) for name, tensor in named_weights]
        runner = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        try:
            runner.reload_weights(weights_iterator=iter(weights))
        except Exception as error:
            raise EngineError(f"vLLM failed while reloading its weights: {error}") from error
        if self._weights is not None:
            self._weights.changed()
        forget_prefixes(self._llm)
        self.version = version

    def verify(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Compare checksums; the engine must have been started with readable weights."""
        if self._weights is None:
            raise EngineError(
                "this engine's weights are repacked and cannot be compared; start it with "
                "readable_weights=True"
            )
        weight_tools.compare(named_weights, self._weights.storage.views())


@contextmanager
def failures_named() -> Iterator[None]:
    """A device that fails inside becomes an EngineError: the step before is done all the same."""
    try:
        yield
    except RuntimeError as error:
        raise EngineError(f"the new weights did not reach the engine: {error}") from error


def forget_prefixes(llm: object, when: str = "after a weight update") -> None:
    """Drop cached keys and values that are no longer good. Raises EngineError that says `when`."""
    try:
        forgotten = llm.reset_prefix_cache()
    except Exception as error:
        raise EngineError(f"vLLM failed {when}: {error}") from error
    if not forgotten:
        raise EngineError(f"vLLM kept its prefix cache {when}: it is still busy")
