"""Decoding without transformers' modules: a layer is five products and a handful of row passes.

For models whose layers the learner has fused: in bfloat16 on processors with AVX512-BF16, in
float32 on all that multiply and add at once. Logits come out in float32, so sampled log-probs carry
no rounding of the LM head.

Legend: B completions, H hidden, Hq / Hkv query and key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polymath_fast.kernels.cpu import decode
from polymath_fast.kernels.cpu.head import odd_lines
from polymath_fast.kernels.cpu.operands import bits, padded_rows
from polymath_fast.kernels.cpu.team import together
from polymath_fast.kernels.cpu.workspace import buffer
from polymath_fast.rollout.decode import PromptCache
from polymath_fast.rollout.recorder import Recorder
from polymath_fast.rollout.tape import Tape
from polymath_fast.rollout.tile_cache import TileCache
from polymath_fast.rollout.tile_weights import TileWeights


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
        self._cache = TileCache(weights, prompts, tokens, most)

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
        self._cache.make_room(counts)
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
            weights.sizes.heads,
            bits(cos[:, 0].contiguous()),
            bits(sin[:, 0].contiguous()),
            weights.eps,
            firsts.numpy(),
            *self._cache.operands(),
            weights.scale,
            *(bits(each) for each in rows),
            recorded,
            *(bits(each) for each in self._tape),
        )
        return self._logits(rows.out[:count])

    def advance(self, kept: Tensor) -> None:
        """Keep the first kept (B,) tokens of each completion's block; the next one overwrites."""
        self._positions += kept
        self._cache.advance(kept)

    def blocks(self) -> TileDecoder:
        """The same completions, from here on by blocks."""
        return self

    def keep(self, rows: Tensor) -> None:
        """See `transformers_engine.Decoder`."""
        self._positions, self._begins = self._positions[rows], self._begins[rows]
        self._cache.keep(rows)

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
        shape = (len(hidden), odd_lines(weights.sizes.vocab, 4))
        out = buffer("decoded logits", shape, torch.float32)
        weights.head.logits(hidden, out[:, : weights.sizes.vocab])
        if weights.bias is not None:
            out[:, : weights.sizes.vocab] += weights.bias
        return out
