"""The embedded sampler: completions drawn from the learner's own module, prompt prefilled once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from polymath_fast.learner.policy import Policy
from polymath_fast.rollout import tile_decoder
from polymath_fast.rollout.decode import ModuleDecoder, PromptCache, run_decoder
from polymath_fast.rollout.sampling import sample_tokens
from polymath_fast.rollout.speculation import Speculation
from polymath_fast.rollout.tail import BlockDecoder, Tail, Wave
from polymath_fast.rollout.types import Completion, SamplingOptions
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

    def blocks(self) -> BlockDecoder:
        """The same completions, from here on by blocks; this decoder is not used again."""


class TransformersEngine:
    """Samples from `policy`'s weights as they are now; there is nothing to sync."""

    name = "transformers"

    def __init__(
        self,
        policy: Policy,
        *,
        stop_token_ids: Sequence[int],
        max_num_seqs: int = 256,
        speculation: Speculation | None = None,
    ):
        """`max_num_seqs` completions decode together; more of them are drawn in several waves."""
        self.policy = policy
        self.speculation = speculation or Speculation()
        self.stop_token_ids = frozenset(stop_token_ids)
        self.max_num_seqs = max_num_seqs
        self.weights = IdentitySync()

    def generate(
        self, prompt_ids: Sequence[int], n: int, sampling: SamplingOptions
    ) -> list[Completion]:
        """n completions of one prompt."""
        return self.generate_many([prompt_ids], n, sampling)[0]

    @torch.inference_mode()
    def generate_many(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingOptions
    ) -> list[list[Completion]]:
        """n completions for each prompt, in the order of the prompts."""
        weights = tile_decoder.TileWeights(self.policy) if tile_decoder.fits(self.policy) else None
        generator = torch.Generator().manual_seed(sampling.seed)
        prefill = lru_cache(self.max_num_seqs)(lambda index: self._prefill(prompts[index]))
        completions: list[Completion] = []
        self.speculation.start_call()
        for wave in self._waves(len(prompts), n):
            uniforms = torch.rand(
                len(wave), sampling.max_completion_length, dtype=torch.float64, generator=generator
            )
            prefilled = [prefill(index) for index in wave]
            if weights is not None:
                decoder = tile_decoder.TileDecoder(weights, prefilled)
            else:
                decoder = ModuleDecoder(self.policy, prefilled)
            asked = [prompts[index] for index in wave]
            drawn = self._decode(decoder, asked, uniforms, sampling)
            self.speculation.sampled(asked, drawn)
            completions += drawn
        return [completions[i : i + n] for i in range(0, len(completions), n)]

    def _waves(self, num_prompts: int, n: int) -> Iterator[list[int]]:
        """Prompt index of every completion, cut into batches that decode together.

        Completions of different prompts share a batch only when each prompt has few of them.
        """
        slots = [index for index in range(num_prompts) for _ in range(n)]
        stretch = n if n >= _ALONE_FROM else len(slots)
        for start in range(0, len(slots), stretch):
            for first in range(start, start + stretch, self.max_num_seqs):
                yield slots[first : min(first + self.max_num_seqs, start + stretch)]

    def sleep(self) -> None:
        """Nothing is held between rollouts."""

    def wake(self) -> None:
        """Nothing was given up."""

    def close(self) -> None:
        """The module belongs to the learner."""

    def _prefill(self, prompt_ids: Sequence[int]) -> tuple[PromptCache, Tensor]:
        prompt = PromptCache()
        ids = torch.tensor([list(prompt_ids)], device=self.policy.device)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return prompt, run_decoder(self.policy, ids, positions, prompt)[:, -1]  # (1, H)

    def _decode(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        uniforms: Tensor,
        sampling: SamplingOptions,
    ) -> list[Completion]:
        """One wave in lock step; row i reads uniforms[i], so finished rows change nobody's draw."""
        wave, limit = uniforms.shape
        vocab = self.policy.head.weight.shape[0]
        stop = torch.tensor(sorted(self.stop_token_ids))
        tokens = torch.zeros(wave, limit, dtype=torch.int64)
        logprobs = torch.zeros(wave, limit)
        lengths = torch.full((wave,), limit)
        rows = torch.arange(wave)  # which completion each row of the batch is
        alive = torch.ones(wave, dtype=torch.bool)

        def draw(logits: Tensor, rows: Tensor, steps: Tensor | int) -> tuple[Tensor, Tensor]:
            chosen = uniforms[rows, steps].to(logits.device)
            found = sample_tokens(logits, chosen, sampling.temperature, vocab)
            return found[0].cpu(), found[1].cpu()

        logits = decoder.first()
        for step in range(limit):
            drawn, drawn_logprobs = draw(logits, rows, step)
            tokens[rows[alive], step] = drawn[alive]
            logprobs[rows[alive], step] = drawn_logprobs[alive]
            ended = torch.isin(drawn, stop) & alive
            lengths[rows[ended]] = step + 1
            alive &= ~ended
            remaining = int(alive.sum())
            if remaining == 0 or step + 1 == limit:
                break
            if self.speculation.begins(remaining):
                kept = alive.nonzero()[:, 0]
                decoder.keep(kept)
                lengths[rows[kept]] = step + 1
                drawn_so_far = Wave(prompts, tokens, logprobs, lengths, self.stop_token_ids, draw)
                tail = Tail(self.speculation, decoder.blocks(), drawn_so_far, rows[kept])
                for _ in tail.run():
                    pass
                break
            if step and remaining < _SHRINK_BELOW * len(rows):
                kept = alive.nonzero()[:, 0]
                decoder.keep(kept)
                rows, drawn, alive = rows[kept], drawn[kept], alive[kept]
            logits = decoder.next(drawn)
        return [self._completion(tokens[i], logprobs[i], int(lengths[i])) for i in range(wave)]

    def _completion(self, tokens: Tensor, logprobs: Tensor, length: int) -> Completion:
        ids = tokens[:length].tolist()
        return Completion(
            token_ids=ids,
            sampling_logprobs=logprobs[:length].tolist(),
            finish_reason="stop" if ids[-1] in self.stop_token_ids else "length",
            weight_version=self.weights.version,
        )
