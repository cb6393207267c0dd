"""Completions of vLLM's engine as they finish: its scheduler is driven one step at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import Any

from polymath_fast.errors import EngineError
from polymath_fast.rollout.streaming import Quotas, aborted
from polymath_fast.rollout.types import Completion, Drawn, Request, SamplingOptions

_FINISHED = ("stop", "length", "repetition")
_names = count()


def stream(
    engine: Any,
    requests: Sequence[Request],
    sampling: SamplingOptions,
    stop_token_ids: Sequence[int],
    weight_version: int,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Drawn]:
    """The completions of all requests; see `StreamingEngine.stream`.

    Args:
        engine: vLLM's LLMEngine, in this process and with nothing else to do.
        stopped: asked after every step of the engine; True aborts what is left without a word.
    """
    import numpy as np
    import torch

    # The sampler draws from torch's global generator; a seed per request would cost a generator
    # and a kernel launch for every row of every step. vLLM's second model runner, which a user may
    # ask for, makes seeds of its own, with numpy's.
    torch.manual_seed(sampling.seed)
    np.random.seed(sampling.seed % 2**32)
    running = _Running(engine, requests, weight_version)
    quotas = Quotas(requests)
    try:
        with _failures_named():
            running.add_all(sampling, stop_token_ids)
            while running.left:
                finished = running.step()
                yield from finished
                for drawn in finished:
                    quotas.count(drawn.request)
                if finished:
                    yield from running.abort(quotas.met)
                if stopped():
                    running.abort(lambda request: True)
            running.drain()
    except GeneratorExit:  # closed before its end, between two steps
        with _failures_named():
            running.abort(lambda request: True)
            running.drain()
        raise


@contextmanager
def _failures_named() -> Iterator[None]:
    """Raises EngineError for what vLLM raises."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"vLLM failed while sampling: {error}") from error


class _Running:
    """The requests of one stream, each completion being a request of its own to vLLM.

    vLLM would return n completions of one request together, with the last of them.
    """

    def __init__(self, engine: Any, requests: Sequence[Request], weight_version: int) -> None:
        self._engine = engine
        self._requests = requests
        self._version = weight_version
        self._inner: dict[str, str] = {}  # our name of a request -> vLLM's own
        self.left: dict[str, tuple[int, int]] = {}
        """name -> (request, index) of what has not finished, in the order it was asked"""

    def add_all(self, sampling: SamplingOptions, stop_token_ids: Sequence[int]) -> None:
        """Hand every completion to vLLM's scheduler."""
        make_params = cache(lambda most: _sampling_params(sampling, most, stop_token_ids))
        for number, request in enumerate(self._requests):
            for index in range(request.n):
                begun = self._begun(number, index)
                ids = [*request.prompt_ids, *(begun.token_ids if begun else ())]
                most = sampling.max_completion_length - len(begun.token_ids if begun else ())
                name = f"polymath_fast-{next(_names)}"
                self._inner[name] = self._engine.add_request(
                    name, {"prompt_token_ids": ids}, make_params(most)
                )
                self.left[name] = (number, index)

    def step(self) -> list[Drawn]:
        """Let vLLM run once; what has finished with that."""
        if not self._engine.has_unfinished_requests():
            raise EngineError(f"vLLM lost {len(self.left)} requests")
        finished = []
        for output in self._engine.step():
            if output.finished and output.request_id in self.left:
                slot = self.left.pop(output.request_id)
                finished.append(self._drawn(slot, output, _FINISHED))
        return sorted(finished, key=lambda drawn: drawn[:2])

    def abort(self, unwanted: Callable[[int], bool]) -> list[Drawn]:
        """Abort the requests r with `unwanted(r)`; what they had drawn so far."""
        names = [name for name, (request, _) in self.left.items() if unwanted(request)]
        if not names:
            return []
        found = []
        for name in names:
            slot = self.left.pop(name)
            state = self._engine.output_processor.request_states[self._inner[name]]
            output = _output_so_far(state)
            found.append(self._drawn(slot, output, ("abort",)))
        self._engine.abort_request([self._inner[name] for name in names], internal=True)
        return found

    def drain(self) -> None:
        """Let vLLM finish the step that it may have begun ahead, and forget what was aborted: with
        requests in flight it would not reset its prefix cache."""
        core = self._engine.engine_core.engine_core
        while core.scheduler.has_requests() or core.batch_queue:
            self._engine.step()

    def _begun(self, request: int, index: int) -> Completion | None:
        begun = self._requests[request].begun
        return begun[index] if index < len(begun) else None

    def _drawn(self, slot: tuple[int, int], output: Any, reasons: Sequence[str]) -> Drawn:
        begun = self._begun(*slot)
        (one,) = output.outputs
        if one.finish_reason not in reasons:
            raise EngineError(f"vLLM ended a completion with {one.finish_reason!r}")
        if not one.token_ids:
            return Drawn(*slot, aborted(begun, self._version))
        completion = _completion(one, self._version)
        return Drawn(*slot, begun.extended(completion) if begun else completion)


def _sampling_params(
    sampling: SamplingOptions, max_tokens: int, stop_token_ids: Sequence[int]
) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind

    repetition = None
    if sampling.stop_repetition:
        repetition = RepetitionDetectionParams(
            max_pattern_size=sampling.repetition_period, min_count=sampling.stop_repetition
        )
    return SamplingParams(
        temperature=sampling.temperature,
        max_tokens=max_tokens,
        stop_token_ids=list(stop_token_ids),
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        repetition_detection=repetition,
        skip_clone=True,  # a deep copy for every request takes half of the time to add it
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _output_so_far(state: Any) -> Any:
    """What vLLM has noted of a request, as it would return it at its end."""
    from vllm.v1.engine import FinishReason

    return state.make_request_output(
        new_token_ids=[], pooling_output=None, finish_reason=FinishReason.ABORT, stop_reason=None
    )


def _completion(output: Any, weight_version: int) -> Completion:
    logprobs = list(output.logprobs.logprobs)
    token_ids = list(output.token_ids)
    if len(logprobs) != len(token_ids) or not all(map(math.isfinite, logprobs)):
        raise EngineError(
            f"vLLM returned {len(logprobs)} log-probs for {len(token_ids)} tokens, or some that "
            "are not finite; this version's log-prob layout is not the tested one"
        )
    reason = output.finish_reason
    return Completion(
        token_ids=token_ids,
        sampling_logprobs=[min(x, 0.0) for x in logprobs],
        finish_reason="aborted" if reason == "abort" else reason,
        weight_version=weight_version,
    )
