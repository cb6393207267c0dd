"""What every engine builds on its stream of completions, and how a stream knows when to stop."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import TYPE_CHECKING

from polymath_fast.rollout.types import Completion, Drawn, Request, SamplingOptions

if TYPE_CHECKING:
    from polymath_fast.kernels.scratch import Arena


class StreamingEngine:
    """An engine whose `stream` does the work."""

    @abstractmethod
    def stream(self, requests: Sequence[Request], sampling: SamplingOptions) -> Iterator[Drawn]:
        """The completions of all requests, each as soon as it has finished or was aborted.

        Every request gives `n` of them. What has finished at the same moment comes in the order of
        requests and indices. Closing the iterator aborts the rest.

        Raises EngineError when the engine dies.
        """

    def generate(
        self, prompt_ids: Sequence[int], n: int, sampling: SamplingOptions
    ) -> list[Completion]:
        """n completions of one prompt."""
        return self.generate_many([prompt_ids], n, sampling)[0]

    def generate_many(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingOptions
    ) -> list[list[Completion]]:
        """n completions for each prompt, in the order of the prompts."""
        distinct = n if sampling.temperature else min(n, 1)  # greedy ones are all the same
        requests = [Request(prompt_ids=ids, n=distinct) for ids in prompts]
        found: list[dict[int, Completion]] = [{} for _ in prompts]
        with closing(self.stream(requests, sampling)) as stream:
            for number, index, completion in stream:
                found[number][index] = completion
        return [[each[i % distinct] for i in range(n)] for each in found]

    def lend(self) -> AbstractContextManager[Arena | None]:
        """Scratch memory for the operators of this thread, while nothing is sampled; None where the
        engine has none to lend, or was not started to."""
        return nullcontext()


class Quotas:
    """Which requests of a stream have got what they need."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._left = [each.n if each.needed is None else each.needed for each in requests]

    def count(self, request: int) -> None:
        """One more completion of `request` has finished."""
        self._left[request] -= 1

    def met(self, request: int) -> bool:
        """Whether the other completions of `request` are not needed any more."""
        return self._left[request] <= 0


def aborted(begun: Completion | None, weight_version: int) -> Completion:
    """A completion that was aborted before a token was drawn, after those of `begun`."""
    return begun or Completion(
        token_ids=[],
        sampling_logprobs=[],
        finish_reason="aborted",
        weight_version=weight_version,
    )
