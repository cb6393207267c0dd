"""Completions that decode together in the embedded sampler, and what each has drawn so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polymath_fast.rollout.recorder import Recorder
from polymath_fast.rollout.repetition import RepetitionWatch
from polymath_fast.rollout.sampling import sample_tokens
from polymath_fast.rollout.tape import Tape
from polymath_fast.rollout.types import Completion, Drawn, Request, SamplingOptions


class Slot(NamedTuple):
    """Place of one completion: number `index` of `request`."""

    request: int
    index: int
    prompt: tuple[int, ...]
    begun: Completion | None

    @property
    def prefix(self) -> tuple[int, ...]:
        """Ids that the first new token follows: the prompt, and those of `begun`."""
        return self.prompt + tuple(self.begun.token_ids if self.begun else ())


def slots_of(requests: Sequence[Request]) -> list[Slot]:
    """One for every completion that is asked for."""
    return [
        Slot(
            number,
            index,
            tuple(request.prompt_ids),
            request.begun[index] if index < len(request.begun) else None,
        )
        for number, request in enumerate(requests)
        for index in range(request.n)
    ]


class Wave:
    """W completions of at most L tokens each.

    Row i reads uniforms[i, t] for the t-th token that it draws here, whoever else is left and
    however many tokens a pass gives, so that neither changes anybody's draw.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        sampling: SamplingOptions,
        stop_token_ids: frozenset[int],
        vocab: int,
        generator: torch.Generator,
        recorder: Recorder | None = None,
    ) -> None:
        """`vocab`: logits from this column on are padding. `recorder`: of the decoder's passes, as
        far as completions begin here: what came before was computed by another pass."""
        count, limit = len(slots), sampling.max_completion_length
        self.slots = slots
        self.lengths = torch.zeros(count, dtype=torch.int64)
        """(W,) tokens drawn here"""
        self.tokens = torch.zeros(count, limit, dtype=torch.int64)
        self._logprobs = torch.zeros(count, limit)
        self._uniforms = torch.rand(count, limit, dtype=torch.float64, generator=generator)
        begun = [len(slot.begun.token_ids) if slot.begun else 0 for slot in slots]
        self._limits = limit - torch.tensor(begun)  # (W,) tokens that may still be drawn
        self._stop = torch.tensor(sorted(stop_token_ids))
        self._temperature, self._vocab = sampling.temperature, vocab
        self._recorder = recorder or Recorder(Tape(), 0, 0)
        for row, slot in enumerate(slots):
            if slot.begun is not None:
                self._recorder.drop(row)
        self._watch = None
        if sampling.stop_repetition:
            self._watch = RepetitionWatch(
                count, sampling.stop_repetition, sampling.repetition_period
            )

    def draw(
        self, logits: Tensor, rows: Tensor, places: Tensor, branches: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens and log-probs (R,), on the CPU, of rows (R,) at places (R,), each by the row of
        logits (B, V) that `branches` (R,) says."""
        uniforms = self._uniforms[rows, places].to(logits.device)
        recording = self._recorder.predict(rows, places, branches, len(logits))
        tokens, logprobs = sample_tokens(
            logits, uniforms, self._temperature, self._vocab, recording, branches
        )
        return tokens.cpu(), logprobs.cpu()

    def follow(self, rows: Tensor, branches: Tensor) -> None:
        """The decoder's next pass computes `rows` (C,) of the wave in its rows `branches` (C,)."""
        self._recorder.follow(rows, branches)

    def append(self, rows: Tensor, tokens: Tensor, logprobs: Tensor) -> dict[int, str]:
        """Take in one token of each of `rows`, which are ascending and have drawn as many; those
        that end with it, and why."""
        place = int(self.lengths[rows[0]])
        self.tokens[rows, place] = tokens
        self._logprobs[rows, place] = logprobs
        self.lengths[rows] = place + 1
        reasons = {
            "stop": torch.isin(tokens, self._stop),
            "length": self._limits[rows] <= place + 1,
        }
        if self._watch is not None:
            reasons["repetition"] = self._watch.looped(self.tokens, rows, place)
        ended: dict[int, str] = {}
        for reason, which in reasons.items():  # of several, the first one counts
            for row in rows[which].tolist():
                ended.setdefault(row, reason)
        return dict(sorted(ended.items()))

    def left(self, row: int) -> int:
        """Tokens that a row may still draw."""
        return int(self._limits[row] - self.lengths[row])

    def so_far(self, row: int) -> list[int]:
        """Token ids of a completion, with those that it began with."""
        begun = self.slots[row].begun
        here = self.tokens[row, : self.lengths[row]].tolist()
        return [*begun.token_ids, *here] if begun else here

    def drawn(self, row: int, finish_reason: str, weight_version: int) -> Drawn:
        """What a row has drawn, after what it began with."""
        slot, length = self.slots[row], int(self.lengths[row])
        if finish_reason == "aborted":
            self._recorder.drop(row)
        completion = Completion(
            token_ids=self.tokens[row, :length].tolist(),
            sampling_logprobs=self._logprobs[row, :length].tolist(),
            finish_reason=finish_reason,
            weight_version=weight_version,
            recorded=self._recorder.recorded(row, length, weight_version),
        )
        if slot.begun is not None:
            completion = slot.begun.extended(completion)
        return Drawn(slot.request, slot.index, completion)
