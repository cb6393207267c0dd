"""The KV cache of a vLLM engine in this process, as scratch memory for the learner.

Between rollouts its blocks are dead: no request holds one, and what the prefix cache remembers is
dropped at the next weight update anyway. vLLM 0.26 allocates a tensor for each layer, 0.32 one for
all, and hands the layers views of them, so memory is taken storage by storage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from polymath_fast.errors import EngineError
from polymath_fast.kernels import scratch
from polymath_fast.rollout.vllm_sync import forget_prefixes


class LentCache:
    """Lends the KV cache of `llm`, a vllm.LLM that this thread has started."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._away = False
        # vLLM gives the thread that starts it a stream of its own, and runs on that one.
        on_gpu = any(storage.device.type == "cuda" for storage in storages(llm))
        self._stream = torch.cuda.current_stream() if on_gpu else None

    @contextmanager
    def lend(self) -> Iterator[scratch.Arena]:
        """Let the operators of this thread work in the KV cache until the end.

        The prefix cache is forgotten before the first byte is overwritten, whether or not weights
        change, and the engine finds zeros, as after its start, wherever memory was handed out.

        Raises EngineError when the engine still works on requests.
        """
        core = self._llm.llm_engine.engine_core.engine_core
        if core.scheduler.has_requests() or core.batch_queue:
            raise EngineError("vLLM still works on requests, and their keys and values are in use")
        forget_prefixes(self._llm, "before its KV cache was lent")
        arena = scratch.Arena(storages(self._llm))
        if self._stream is not None:  # the engine's last reads come before the first writes
            torch.cuda.current_stream(arena.device).wait_stream(self._stream)
        self._away = True
        try:
            with scratch.lend(arena):
                yield arena
        finally:
            if self._stream is not None:  # and the zeros before its next ones
                self._stream.wait_stream(torch.cuda.current_stream(arena.device))
            self._away = False

    def require_back(self) -> None:
        """Raise EngineError during a loan."""
        if self._away:
            raise EngineError("vLLM's KV cache is lent to the learner: end the loan, then sample")


def storages(llm: Any) -> list[torch.UntypedStorage]:
    """The memory behind the keys and values of all layers; several may name the same."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    found = []
    for cache in runner.kv_caches:
        tensors = [cache] if isinstance(cache, torch.Tensor) else cache
        found += [tensor.untyped_storage() for tensor in tensors]
    return found
