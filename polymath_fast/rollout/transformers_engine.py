"""The embedded sampler: completions drawn from the learner's own module, prompt prefilled once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from polymath_fast.learner.policy import Policy
from polymath_fast.rollout import tile_decoder
from polymath_fast.rollout.decode import ModuleDecoder, PromptCache, run_decoder
from polymath_fast.rollout.repetition import RepetitionWatch
from polymath_fast.rollout.sampling import sample_tokens
from polymath_fast.rollout.streaming import Quotas, StreamingEngine, aborted
from polymath_fast.rollout.types import Completion, Drawn, Request, SamplingOptions
from polymath_fast.rollout.weights import IdentitySync

_SHRINK_BELOW = 0.8  # share of unfinished rows below which finished ones leave the batch
_ALONE_FROM = 16  # completions of one prompt from which it decodes in a batch of its own


class Decoder(Protocol):
    """B completions that grow in lock step."""

    def first(self) -> Tensor:
        """(B, V or more) logits of the tokens that follow the prompts."""

    def next(self, tokens: Tensor) -> Tensor:
        """(B, V or more) logits after one more token (B,) a completion."""

    def keep(self, rows: Tensor) -> None:
        """Drop all completions but `rows` (indices into the present batch)."""


class Slot(NamedTuple):
    """Place of one completion: number `index` of `request`."""

    request: int
    index: int
    prefix: tuple[int, ...]
    """ids that the first new token follows: the prompt, and those of `begun`"""
    begun: Completion | None


class TransformersEngine(StreamingEngine):
    """Samples from `policy`'s weights as they are now; there is nothing to sync."""

    name = "transformers"

    def __init__(self, policy: Policy, *, stop_token_ids: Sequence[int], max_num_seqs: int = 256):
        """`max_num_seqs` completions decode together; more of them are drawn in several waves."""
        self.policy = policy
        self.stop_token_ids = frozenset(stop_token_ids)
        self.max_num_seqs = max_num_seqs
        self.weights = IdentitySync()

    @torch.inference_mode()
    def stream(self, requests: Sequence[Request], sampling: SamplingOptions) -> Iterator[Drawn]:
        """The completions of all requests, as they finish; see `StreamingEngine.stream`."""
        quotas = Quotas(requests)
        make_decoder = self._decoders()
        generator = torch.Generator().manual_seed(sampling.seed)
        for wave in self._waves(_slots(requests)):
            needed = [slot for slot in wave if not quotas.met(slot.request)]
            for slot in wave:
                if quotas.met(slot.request):
                    yield Drawn(*slot[:2], aborted(slot.begun, self.weights.version))
            if needed:
                uniforms = torch.rand(
                    len(needed),
                    sampling.max_completion_length,
                    dtype=torch.float64,
                    generator=generator,
                )
                yield from self._decode(make_decoder(needed), needed, uniforms, sampling, quotas)

    def _decoders(self) -> Callable[[Sequence[Slot]], Decoder]:
        """Makes decoders on the weights as they are now; each prefix is computed once."""
        weights = tile_decoder.TileWeights(self.policy) if tile_decoder.fits(self.policy) else None
        prefill = lru_cache(self.max_num_seqs)(self._prefill)

        def make(wave: Sequence[Slot]) -> Decoder:
            prefilled = [prefill(slot.prefix) for slot in wave]
            if weights is not None:
                return tile_decoder.TileDecoder(weights, prefilled)
            return ModuleDecoder(self.policy, prefilled)

        return make

    def _waves(self, slots: Sequence[Slot]) -> Iterator[list[Slot]]:
        """The slots in batches that decode together.

        Completions of different prefixes share a batch only when each prefix has few of them.
        """
        times = Counter(slot.prefix for slot in slots)
        batches: dict[tuple[int, ...], list[Slot]] = {}
        for slot in slots:
            alone = times[slot.prefix] >= _ALONE_FROM
            batches.setdefault(slot.prefix if alone else (), []).append(slot)
        for batch in batches.values():
            for first in range(0, len(batch), self.max_num_seqs):
                yield batch[first : first + self.max_num_seqs]

    def sleep(self) -> None:
        """Nothing is held between rollouts."""

    def wake(self) -> None:
        """Nothing was given up."""

    def close(self) -> None:
        """The module belongs to the learner."""

    def _prefill(self, prompt_ids: tuple[int, ...]) -> tuple[PromptCache, Tensor]:
        prompt = PromptCache()
        ids = torch.tensor([prompt_ids], device=self.policy.device)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return prompt, run_decoder(self.policy, ids, positions, prompt)[:, -1]  # (1, H)

    def _decode(
        self,
        decoder: Decoder,
        wave: Sequence[Slot],
        uniforms: Tensor,
        sampling: SamplingOptions,
        quotas: Quotas,
    ) -> Iterator[Drawn]:
        """One wave in lock step; row i reads uniforms[i], so finished rows change nobody's draw."""
        drawn_so_far = _Rows(wave, sampling, self.stop_token_ids)
        vocab = self.policy.head.weight.shape[0]
        rows = torch.arange(len(wave))  # which completion each row of the batch is
        alive = torch.ones(len(wave), dtype=torch.bool)
        logits = decoder.first()
        while True:
            step = drawn_so_far.steps
            tokens, logprobs = sample_tokens(
                logits, uniforms[rows, step].to(logits.device), sampling.temperature, vocab
            )
            tokens, logprobs = tokens.cpu(), logprobs.cpu()
            ended = drawn_so_far.append(rows[alive], tokens[alive], logprobs[alive])
            for row, reason in ended.items():
                yield drawn_so_far.drawn(row, reason, self.weights.version)
                quotas.count(wave[row].request)
            for row in rows[alive].tolist() if ended else ():
                if row not in ended and quotas.met(wave[row].request):
                    ended[row] = "aborted"
                    yield drawn_so_far.drawn(row, "aborted", self.weights.version)
            alive &= ~torch.isin(rows, torch.tensor(list(ended), dtype=torch.int64))
            remaining = int(alive.sum())
            if remaining == 0:
                return
            if step and remaining < _SHRINK_BELOW * len(rows):
                kept = alive.nonzero()[:, 0]
                decoder.keep(kept)
                rows, tokens, alive = rows[kept], tokens[kept], alive[kept]
            logits = decoder.next(tokens)


class _Rows:
    """What the rows of one wave have drawn so far."""

    def __init__(
        self, wave: Sequence[Slot], sampling: SamplingOptions, stop_token_ids: frozenset[int]
    ) -> None:
        self.steps = 0
        self._wave = wave
        limit = sampling.max_completion_length
        begun = [len(slot.begun.token_ids) if slot.begun else 0 for slot in wave]
        self._limits = limit - torch.tensor(begun)  # (B,) tokens that may still be drawn
        self._tokens = torch.zeros(len(wave), limit, dtype=torch.int64)
        self._logprobs = torch.zeros(len(wave), limit)
        self._stop = torch.tensor(sorted(stop_token_ids))
        self._watch = None
        if sampling.stop_repetition:
            self._watch = RepetitionWatch(
                len(wave), sampling.stop_repetition, sampling.repetition_period
            )

    def append(self, rows: Tensor, tokens: Tensor, logprobs: Tensor) -> dict[int, str]:
        """Take in one token of each of `rows`, ascending; those that end with it, and why."""
        self._tokens[rows, self.steps] = tokens
        self._logprobs[rows, self.steps] = logprobs
        reasons = {
            "stop": torch.isin(tokens, self._stop),
            "length": self._limits[rows] <= self.steps + 1,
        }
        if self._watch is not None:
            reasons["repetition"] = self._watch.looped(self._tokens, rows, self.steps)
        self.steps += 1
        ended: dict[int, str] = {}
        for reason, which in reasons.items():  # of several, the first one counts
            for row in rows[which].tolist():
                ended.setdefault(row, reason)
        return dict(sorted(ended.items()))

    def drawn(self, row: int, finish_reason: str, weight_version: int) -> Drawn:
        """What `row` has drawn, after what it began with."""
        slot = self._wave[row]
        completion = Completion(
            token_ids=self._tokens[row, : self.steps].tolist(),
            sampling_logprobs=self._logprobs[row, : self.steps].tolist(),
            finish_reason=finish_reason,
            weight_version=weight_version,
        )
        if slot.begun is not None:
            completion = slot.begun.extended(completion)
        return Drawn(slot.request, slot.index, completion)


def _slots(requests: Sequence[Request]) -> list[Slot]:
    """One for every completion that is asked for."""
    slots = []
    for number, request in enumerate(requests):
        prompt = tuple(request.prompt_ids)
        for index in range(request.n):
            begun = request.begun[index] if index < len(request.begun) else None
            ids = tuple(begun.token_ids) if begun else ()
            slots.append(Slot(number, index, prompt + ids, begun))
    return slots
