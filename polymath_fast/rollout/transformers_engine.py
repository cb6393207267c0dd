"""The embedded sampler: completions drawn from the learner's own module, prompt prefilled once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from polymath_fast.kernels.cpu import workspace
from polymath_fast.learner.policy import Policy
from polymath_fast.rollout import tile_decoder, tile_weights
from polymath_fast.rollout.branches import Branches
from polymath_fast.rollout.decode import ModuleDecoder, PromptCache, run_decoder
from polymath_fast.rollout.recorder import Recorder
from polymath_fast.rollout.speculation import Speculation
from polymath_fast.rollout.streaming import Quotas, StreamingEngine, aborted
from polymath_fast.rollout.tail import BlockDecoder, Tail
from polymath_fast.rollout.tape import Tape
from polymath_fast.rollout.types import Drawn, Request, SamplingOptions
from polymath_fast.rollout.wave import Slot, Wave, slots_of
from polymath_fast.rollout.weights import IdentitySync

_ALONE_FROM = 16  # completions of one prompt from which it decodes in a batch of its own


class Decoder(Protocol):
    """B completions that grow in lock step. Logits may be overwritten by the next call."""

    shrink_below: float
    """share of unfinished completions below which it pays to drop the others"""

    def first(self) -> Tensor:
        """(B, V or more) logits of the tokens that follow the prompts."""

    def next(self, tokens: Tensor) -> Tensor:
        """(B, V or more) logits after one more token (B,) a completion."""

    def keep(self, rows: Tensor) -> None:
        """Go on with `rows` (indices into the present batch) alone; one that is named several times
        goes on as so many."""

    def blocks(self) -> BlockDecoder:
        """The same completions, from here on by blocks; this decoder is not used again."""


class TransformersEngine(StreamingEngine):
    """Samples from `policy`'s weights as they are now; there is nothing to sync."""

    name = "transformers"

    def __init__(
        self,
        policy: Policy,
        *,
        stop_token_ids: Sequence[int],
        max_num_seqs: int = 256,
        speculation: Speculation | None = None,
        tape: Tape | None = None,
    ):
        """`max_num_seqs` completions decode together; more of them are drawn in several waves.
        `tape` keeps the forward passes of those that decode in tiles."""
        self.policy = policy
        self._tape = tape or Tape()
        self.speculation = speculation or Speculation()
        self.stop_token_ids = frozenset(stop_token_ids)
        self.max_num_seqs = max_num_seqs
        self.weights = IdentitySync()

    @torch.inference_mode()
    def stream(self, requests: Sequence[Request], sampling: SamplingOptions) -> Iterator[Drawn]:
        """The completions of all requests, as they finish; see `StreamingEngine.stream`."""
        with workspace.passing():
            yield from self._stream(requests, sampling)

    def _stream(self, requests: Sequence[Request], sampling: SamplingOptions) -> Iterator[Drawn]:
        quotas = Quotas(requests)
        make_decoder = self._decoders(sampling.max_completion_length)
        generator = torch.Generator().manual_seed(sampling.seed)
        vocab = self.policy.head.weight.shape[0]
        self.speculation.start_call()
        for slots in self._batches(slots_of(requests)):
            needed = [slot for slot in slots if not quotas.met(slot.request)]
            for slot in slots:
                if quotas.met(slot.request):
                    yield Drawn(*slot[:2], aborted(slot.begun, self.weights.version))
            if not needed:
                continue
            limits = (sampling.max_completion_length, sampling.temperature or 1.0)
            recorder = Recorder(self._tape, len(needed), *limits)
            wave = Wave(needed, sampling, self.stop_token_ids, vocab, generator, recorder)
            yield from self._decode(*make_decoder(needed, recorder), wave, quotas)
            rows = range(len(needed))
            self.speculation.sampled([slot.prompt for slot in needed], map(wave.so_far, rows))

    def _decoders(
        self, tokens: int
    ) -> Callable[[Sequence[Slot], Recorder], tuple[Decoder, Branches]]:
        """Makes decoders on the weights as they are now, for completions of at most `tokens`, and
        says which row each of them begins on; each prefix is computed once.

        Only a decoder in tiles has several completions on a row: others would have to copy the
        caches of all for each one that parts.
        """
        weights = tile_weights.TileWeights(self.policy) if tile_weights.fits(self.policy) else None
        prefill = lru_cache(self.max_num_seqs)(self._prefill)

        def make(slots: Sequence[Slot], recorder: Recorder) -> tuple[Decoder, Branches]:
            branches = Branches([slot.prefix for slot in slots], apart=weights is None)
            prefilled = [*map(prefill, branches.starts)]
            if weights is None:
                return ModuleDecoder(self.policy, prefilled), branches
            room = (recorder, tokens, len(slots))
            return tile_decoder.TileDecoder(weights, prefilled, *room), branches

        return make

    def _batches(self, slots: Sequence[Slot]) -> Iterator[list[Slot]]:
        """The slots that decode together.

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
        self, decoder: Decoder, branches: Branches, wave: Wave, quotas: Quotas
    ) -> Iterator[Drawn]:
        """One wave, in lock step until drafts take over."""
        logits = decoder.first()
        for step in range(wave.tokens.shape[1]):
            rows = branches.completions
            places = torch.full_like(rows, step)
            tokens, logprobs = wave.draw(logits, rows, places, branches.rows)
            ended = wave.append(rows, tokens, logprobs)
            yield from self._settle(wave, rows, ended, quotas)
            over = _among(rows, ended)
            branches.drop(over)
            if not len(branches.completions):
                return
            if self.speculation.begins(len(branches.completions)):
                decoder.keep(branches.split())
                break
            parents, fed = branches.grow(tokens[~over], decoder.shrink_below)
            if parents is not None:
                decoder.keep(parents)
            wave.follow(branches.completions, branches.rows)
            logits = decoder.next(fed)
        tail = Tail(self.speculation, decoder.blocks(), wave, branches.completions)
        while len(tail.rows):
            ended = tail.step()
            yield from self._settle(wave, tail.rows, ended, quotas)
            tail.keep((~_among(tail.rows, ended)).nonzero()[:, 0])

    def _settle(
        self, wave: Wave, rows: Tensor, ended: dict[int, str], quotas: Quotas
    ) -> Iterator[Drawn]:
        """What has ended; then those of `rows` that nobody needs any more, which join `ended`."""
        for row, reason in list(ended.items()):
            yield wave.drawn(row, reason, self.weights.version)
            quotas.count(wave.slots[row].request)
        for row in rows.tolist() if ended else ():
            if row not in ended and quotas.met(wave.slots[row].request):
                ended[row] = "aborted"
                yield wave.drawn(row, "aborted", self.weights.version)


def _among(rows: Tensor, ended: dict[int, str]) -> Tensor:
    """(B,) whether each of `rows` (B,) has ended."""
    return torch.isin(rows, torch.tensor(list(ended), dtype=torch.int64))
