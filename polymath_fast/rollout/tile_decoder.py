"""Decoding without transformers' modules: a layer is five products and a handful of row passes.

For models whose layers the learner has fused: in bfloat16 on processors with AVX512-BF16, in
float32 on all that multiply and add at once. Logits come out in float32, so sampled log-probs carry
no rounding of the LM head.

Legend: B completions, H hidden, Hq / Hkv query and key heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from polymath_fast.kernels.cpu import decode
from polymath_fast.kernels.cpu.attention_parts import PANEL
from polymath_fast.kernels.cpu.decode_attention import store
from polymath_fast.kernels.cpu.head import odd_lines
from polymath_fast.kernels.cpu.products import bits, padded_rows
from polymath_fast.kernels.cpu.team import together
from polymath_fast.kernels.cpu.workspace import buffer, claim
from polymath_fast.rollout.decode import PromptCache
from polymath_fast.rollout.recorder import Recorder
from polymath_fast.rollout.tape import Tape
from polymath_fast.rollout.tile_weights import TileWeights

_AT_ONCE = 2**28
"""bytes of caches that are made at their full length; larger ones grow with the completions"""


class _Rows(NamedTuple):
    """What `decode.step` works on, a row a token."""

    hidden: Tensor
    stacked: Tensor
    attended: Tensor
    lse: Tensor
    between: Tensor
    normed: Tensor
    active: Tensor
    out: Tensor


class TileDecoder:
    """B completions that grow in lock step, or by blocks of tokens; see `decode.ModuleDecoder` and
    `decode.ModuleBlocks` for the same on modules. Logits last until the next call."""

    shrink_below = 1.0

    def __init__(
        self,
        weights: TileWeights,
        prefilled: Sequence[tuple[PromptCache, Tensor]],
        recorder: Recorder | None = None,
        tokens: int = 1,
        most: int = 1,
    ):
        """`prefilled[i]` is the prompt that completion i continues and its last hidden state;
        `recorder` keeps what is computed of the completions' own tokens, of which there will
        probably be `tokens` at most, of at most `most` completions."""
        self.weights = weights
        self._recorder = recorder or Recorder(Tape(), 0, 0)
        self._tape = self._recorder.open(weights.sizes)
        self._last = torch.cat([hidden for _, hidden in prefilled])  # (B, H)
        prompts = [prompt for prompt, _ in prefilled]
        self._positions = torch.tensor([prompt.length for prompt in prompts])
        self._begins = self._positions.clone()
        self._shared = prompts[0] if all(prompt is prompts[0] for prompt in prompts) else None
        own = torch.zeros_like(self._positions) if self._shared else self._positions.clone()
        self._lengths = own.numpy()  # (B,) positions of the own cache that are filled
        self._per_word = 4 // self._last.element_size()
        self._prompt_len = self._shared.length if self._shared else 0
        common, longest = _panels(self._prompt_len), int(own.max())
        most = max(most, len(prompts))
        self._keys, self._values = self._first_caches(most, longest + 1, longest + tokens)
        self._slots = torch.arange(len(prompts))  # (B,) places of the completions in the caches
        self._prompt_keys, self._prompt_values = (x[:, 0] for x in self._caches(1, common))
        if self._shared:
            self._store(self._shared, self._prompt_keys, self._prompt_values)
        else:
            for row, prompt in enumerate(prompts):
                self._store(prompt, self._keys[:, row], self._values[:, row])

    def first(self) -> Tensor:
        """(B, V + padding) float32 logits of the tokens that follow the prompts."""
        return self._logits(self._last)

    def next(self, tokens: Tensor) -> Tensor:
        """(B, V + padding) float32 logits after one more token (B,) a completion."""
        each = torch.ones_like(self._positions)
        logits = self.block(tokens, each)
        self.advance(each)
        return logits

    def block(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """(R, V + padding) float32 logits after tokens (R,), counts (B,) of them a completion."""
        weights, count = self.weights, len(tokens)
        self._make_room(counts)
        firsts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        owner = torch.arange(len(counts)).repeat_interleave(counts)
        positions = self._positions[owner] + torch.arange(count) - firsts[owner]
        embedded = weights.embedding(tokens)
        cos, sin = weights.rotary(embedded[:, None], positions[:, None])
        rows = self._rows(count)
        rows.hidden[:count] = embedded
        recorded = self._recorder.begin(owner, positions - self._begins[owner])
        together(
            decode.step,
            decode.PHASES * len(weights.qkv) + 2,
            count,
            weights.norms,
            weights.head_norms,
            weights.biases,
            weights.qkv,
            weights.output,
            weights.gate_up,
            weights.down,
            weights.heads,
            bits(cos[:, 0].contiguous()),
            bits(sin[:, 0].contiguous()),
            weights.eps,
            firsts.numpy(),
            self._lengths,
            self._slots.numpy(),
            self._words(self._keys),
            self._words(self._values),
            self._prompt_len,
            self._words(self._prompt_keys),
            self._words(self._prompt_values),
            weights.scale,
            *(bits(each) for each in rows),
            recorded,
            *(bits(each) for each in self._tape),
        )
        return self._logits(rows.out[:count])

    def advance(self, kept: Tensor) -> None:
        """Keep the first kept (B,) tokens of each completion's block; the next one overwrites."""
        self._positions += kept
        self._lengths += kept.numpy()

    def blocks(self) -> TileDecoder:
        """The same completions, from here on by blocks."""
        return self

    def keep(self, rows: Tensor) -> None:
        """See `transformers_engine.Decoder`; caches stay where they are while there is room."""
        self._positions, self._begins = self._positions[rows], self._begins[rows]
        self._lengths = self._lengths[rows.numpy()]
        slots = self._slots[rows]
        kept, first = np.unique(slots.numpy(), return_index=True)
        copies = torch.ones(len(slots), dtype=torch.bool)
        copies[first] = False
        if copies.any():
            free = np.setdiff1d(np.arange(self._keys.shape[1]), kept)
            slots = self._copied(slots, copies, torch.from_numpy(free))
        self._slots = slots

    def _copied(self, slots: Tensor, copies: Tensor, free: Tensor) -> Tensor:
        """Caches of `slots` (B,), those marked in `copies` (B,) copied to `free` places."""
        count, used = int(copies.sum()), _panels(int(self._lengths.max()))
        missing = count - len(free)
        if missing > 0:
            first, panels = self._keys.shape[1], self._keys.shape[3]
            more = self._caches(max(missing, first // 2), panels)
            pairs = zip((self._keys, self._values), more, strict=True)
            self._keys, self._values = (torch.cat(pair, dim=1) for pair in pairs)
            free = torch.cat([free, torch.arange(first, self._keys.shape[1])])
        sources, targets = slots[copies], free[:count]
        for cache in (self._keys, self._values):
            cache[:, targets, :, :used] = cache[:, sources, :, :used]
        self._values[:, targets, :, used:] = 0  # 0 times what a completion left might be NaN
        return slots.masked_scatter(copies, targets)

    def _rows(self, count: int) -> _Rows:
        """Scratch memory for so many tokens."""
        sizes, rows = self.weights.sizes, padded_rows(count)

        def scratch(name: str, *shape: int, dtype: torch.dtype = sizes.dtype) -> Tensor:
            return buffer(f"decoded {name}", (rows, *shape), dtype)

        return _Rows(
            scratch("hidden", sizes.hidden),
            scratch("stacked", sizes.heads + 2 * sizes.key_heads, sizes.head_dim),
            scratch("attended", sizes.heads * sizes.head_dim),
            scratch("lse", sizes.heads, dtype=torch.float32),
            scratch("between", sizes.hidden),
            scratch("normed", sizes.hidden),
            scratch("active", sizes.inner),
            scratch("out", sizes.hidden),
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        weights = self.weights
        shape = (len(hidden), odd_lines(weights.vocab, 4))
        out = buffer("decoded logits", shape, torch.float32)
        weights.head.logits(hidden, out[:, : weights.vocab])
        if weights.bias is not None:
            out[:, : weights.vocab] += weights.bias
        return out

    def _first_caches(self, count: int, least: int, most: int) -> tuple[Tensor, Tensor]:
        """With room for `most` positions of `count` completions, in scratch memory, unless that is
        much at once."""
        shapes = self._cache_shapes(count, _panels(most))
        if sum(4 * math.prod(shape) for shape in shapes) > _AT_ONCE:
            return self._caches(count, _panels(least))
        names = ("decoded keys", "decoded values")
        keys, values = (claim(n, s, torch.int32) for n, s in zip(names, shapes, strict=True))
        return keys.zero_(), values.zero_()

    def _caches(self, batch: int, panels: int) -> tuple[Tensor, Tensor]:
        """Empty keys (L, B, Hkv, panels, ...) and values, see `decode_attention.store`."""
        keys, values = self._cache_shapes(batch, panels)
        return torch.zeros(keys, dtype=torch.int32), torch.zeros(values, dtype=torch.int32)

    def _cache_shapes(self, batch: int, panels: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        size, shape = self.weights.size, (len(self.weights.qkv), batch, self.weights.key_heads)
        keys = (*shape, panels, size // self._per_word, PANEL)
        return keys, (*shape, panels, -(-size // PANEL), PANEL // self._per_word, PANEL)

    def _store(self, prompt: PromptCache, keys: Tensor, values: Tensor) -> None:
        """The prompt's keys and values of all layers into one completion's place."""
        for layer in range(len(keys)):
            rows = (
                bits(cache[layer][0].transpose(0, 1).contiguous())
                for cache in (prompt.keys, prompt.values)
            )
            places = (self._words(x[layer]) for x in (keys, values))
            store(0, self.weights.key_heads, *rows, 0, *places)

    def _words(self, cache: Tensor) -> np.ndarray:
        return cache.numpy().view(self.weights.qkv.dtype)

    def _make_room(self, counts: Tensor) -> None:
        panels = self._keys.shape[3]
        missing = _panels(int((self._lengths + counts.numpy()).max())) - panels
        if missing <= 0:
            return
        more = self._caches(len(self._slots), max(missing, -(-panels // 2)))
        kept = (cache.index_select(1, self._slots) for cache in (self._keys, self._values))
        pairs = zip(kept, more, strict=True)
        self._keys, self._values = (torch.cat(pair, dim=3) for pair in pairs)
        self._slots = torch.arange(len(self._slots))


def _panels(positions: int) -> int:
    return -(-positions // PANEL)
