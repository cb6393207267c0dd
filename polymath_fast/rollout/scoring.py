"""Texts and rewards of a batch, worked on while some of it is still being sampled."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from polymath_fast.rewards import RewardInput, RewardResult, RewardSet
from polymath_fast.rollout.types import Completion, RolloutBatch
from polymath_fast.samples import Sample


class Scorer:
    """Scores one batch. Use it in a `with` statement that holds the sampling of the batch.

    A thread decodes what is added and lets the rewards work ahead on it (`Reward.prepare`). The
    scores are those of the whole batch, given at once by `RewardSet.score`, which finds the
    verdicts there; nothing else depends on what was done early.

    Attributes:
        overlapped: seconds of such work that nobody had to wait for.
    """

    def __init__(self, rewards: RewardSet, tokenizer: Any) -> None:
        self.overlapped = 0.0
        self._rewards = rewards
        self._tokenizer = tokenizer
        self._texts: dict[tuple[int, ...], str] = {}
        self._added: SimpleQueue[tuple[Sample, Completion] | None] = SimpleQueue()
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="score", daemon=True)

    def __enter__(self) -> Scorer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # An error is not kept waiting: the thread ends by itself, or when the rewards are closed.
        self._end()

    def add(self, sample: Sample, completion: Completion) -> None:
        """A completion of the batch has finished."""
        self._added.put((sample, completion))

    def score(self, batch: RolloutBatch) -> RewardResult:
        """Give every group its texts and rewards. Raises what `RewardSet.score` raises."""
        started = time.perf_counter()
        self._end()
        self._thread.join()
        self.overlapped = max(0.0, self.overlapped - (time.perf_counter() - started))
        if self._error is not None:
            raise self._error
        owners = [group.sample for group in batch.groups for _ in group.completions]
        whole = self._input(owners, batch.completions)
        result = self._rewards.score(
            whole.prompts, whole.completions, whole.completion_ids, whole.columns
        )
        start = 0
        for group in batch.groups:
            span = slice(start, start + len(group.completions))
            group.texts, group.rewards = list(whole.completions[span]), result.total[span]
            start = span.stop
        return result

    def _end(self) -> None:
        self._stop.set()
        self._added.put(None)

    def _work(self) -> None:
        while not self._stop.is_set():
            items = [self._added.get()]
            while not self._added.empty():
                items.append(self._added.get())
            found = [item for item in items if item is not None]
            started = time.perf_counter()
            try:
                if found and not self._stop.is_set():
                    samples, completions = zip(*found, strict=True)
                    self._rewards.prepare(self._input(samples, completions), self._stop.is_set)
            except Exception as error:
                self._error = error
                return
            self.overlapped += time.perf_counter() - started

    def _input(self, samples: Sequence[Sample], completions: Sequence[Completion]) -> RewardInput:
        names = set().union(*(sample.columns for sample in samples))
        columns = {name: [sample.columns.get(name) for sample in samples] for name in sorted(names)}
        return RewardInput(
            prompts=[sample.prompt for sample in samples],
            completions=[self._text(completion) for completion in completions],
            completion_ids=[list(completion.token_ids) for completion in completions],
            columns=columns | {"answer": [sample.answer for sample in samples]},
        )

    def _text(self, completion: Completion) -> str:
        ids = tuple(completion.token_ids)
        if ids not in self._texts:
            self._texts[ids] = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return self._texts[ids]
