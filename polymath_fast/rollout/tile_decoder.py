"""Decoding without transformers' modules: a layer is five products and a handful of row passes.

For models whose layers the learner has fused: in bfloat16 on processors with AVX512-BF16, in
float32 on all that multiply and add at once. Logits come out in float32, so sampled log-probs carry
no rounding of the LM head.

Legend: B completions, H hidden, Hq / Hkv query and key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from polymath_fast.kernels.cpu import decode, tiles
from polymath_fast.kernels.cpu.attention_parts import PANEL
from polymath_fast.kernels.cpu.decode_attention import store
from polymath_fast.kernels.cpu.dense import stacked_or_copied
from polymath_fast.kernels.cpu.head import odd_lines
from polymath_fast.kernels.cpu.products import TileLogits, bits, pack_layers, padded_rows
from polymath_fast.kernels.cpu.team import together
from polymath_fast.kernels.cpu.workspace import buffer
from polymath_fast.learner.policy import Policy
from polymath_fast.rollout.decode import PromptCache
from polymath_fast.rollout.tape import Activations, LayerSizes, Recorder, Tape


def fits(policy: Policy) -> bool:
    """Whether `policy` can decode this way on this machine."""
    weight = policy.head.weight
    if policy.unfused is not None or not tiles.available(weight.dtype):
        return False
    even = weight.shape[1] % 2 == 0 and policy.model.config.intermediate_size % 2 == 0
    size = policy.model.get_decoder().layers[0].self_attn.head_dim
    return size % tiles.LANES == 0 and (even or weight.dtype == torch.float32)


class TileWeights:
    """A policy's weights as they are now, packed for the decoders of one round of sampling."""

    def __init__(self, policy: Policy):
        decoder = policy.model.get_decoder()
        blocks = [(layer.self_attn, layer.mlp) for layer in decoder.layers]
        attention = blocks[0][0]
        self.size, self.scale = attention.head_dim, np.float32(attention.scaling)
        self.key_heads = attention.k_proj.weight.shape[0] // self.size
        self.heads = attention.q_proj.weight.shape[0] // self.size
        weight = blocks[0][1].down_proj.weight
        self.sizes = LayerSizes(
            len(blocks),
            *(weight.shape[0], self.heads, self.key_heads, self.size, weight.shape[1]),
            weight.dtype,
        )
        self.eps = np.float32(decoder.norm.variance_epsilon)
        self.norms = bits(torch.stack(_norms(decoder)))
        self.head_norms = np.stack([self._head_norms(each) for each, _ in blocks])
        self.biases = np.stack([_biases(each) for each, _ in blocks])
        qkv = [[a.q_proj.weight, a.k_proj.weight, a.v_proj.weight] for a, _ in blocks]
        self.qkv = pack_layers("qkv", [stacked_or_copied(weights) for weights in qkv])
        self.output = pack_layers("output", [a.o_proj.weight for a, _ in blocks])
        gates = [mlp.gate_proj.weight for _, mlp in blocks]
        self.gate_up = pack_layers("gate_up", gates, [mlp.up_proj.weight for _, mlp in blocks])
        self.down = pack_layers("down", [mlp.down_proj.weight for _, mlp in blocks])
        self.embedding = decoder.embed_tokens
        self.rotary = decoder.rotary_emb
        self.head = TileLogits(policy.head.weight.detach())
        self.bias = policy.head.bias
        self.vocab = len(policy.head.weight)

    def _head_norms(self, attention: nn.Module) -> np.ndarray:
        """(Hq + Hkv, D) fp32, or (0, 1) where heads are not normalised."""
        if getattr(attention, "q_norm", None) is None:
            return np.empty((0, 1), np.float32)
        q, k = (norm.weight.detach().float() for norm in (attention.q_norm, attention.k_norm))
        rows = [q.expand(self.heads, -1), k.expand(self.key_heads, -1)]
        return torch.cat(rows).numpy()


class TileDecoder:
    """B completions that grow in lock step, or by blocks of tokens; see `decode.ModuleDecoder` and
    `decode.ModuleBlocks` for the same on modules. Logits last until the next call."""

    shrink_below = 1.0

    def __init__(
        self,
        weights: TileWeights,
        prefilled: Sequence[tuple[PromptCache, Tensor]],
        recorder: Recorder | None = None,
    ):
        """`prefilled[i]` is the prompt that completion i continues and its last hidden state;
        `recorder` keeps what is computed of the completions' own tokens."""
        self.weights = weights
        self._recorder = recorder or Tape().claim(0, 0)
        self._recorder.open(weights.sizes)
        self._members = torch.arange(len(prefilled))  # (B,) numbers among those that began
        self._last = torch.cat([hidden for _, hidden in prefilled])  # (B, H)
        prompts = [prompt for prompt, _ in prefilled]
        self._positions = torch.tensor([prompt.length for prompt in prompts])
        self._begins = self._positions.clone()
        self._shared = prompts[0] if all(prompt is prompts[0] for prompt in prompts) else None
        own = torch.zeros_like(self._positions) if self._shared else self._positions.clone()
        self._lengths = own.numpy()  # (B,) positions of the own cache that are filled
        self._per_word = 4 // self._last.element_size()
        self._prompt_len = self._shared.length if self._shared else 0
        panels, common = _panels(int(own.max()) + 1), _panels(self._prompt_len)
        self._keys, self._values = self._caches(len(prompts), panels)
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
        kept, first = self._room(owner, positions)
        kept.hidden[0, first : first + count] = embedded
        normed, active, out = (
            buffer(f"decoded {name}", (padded_rows(count), width), embedded.dtype)
            for name, width in (
                ("normed", weights.sizes.hidden),
                ("active", weights.sizes.inner),
                ("out", weights.sizes.hidden),
            )
        )
        together(
            decode.step,
            decode.PHASES * len(weights.qkv) + 1,
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
            first,
            *(bits(each) for each in (*kept, normed, active, out)),
        )
        return self._logits(out[:count])

    def advance(self, kept: Tensor) -> None:
        """Keep the first kept (B,) tokens of each completion's block; the next one overwrites."""
        self._positions += kept
        self._lengths += kept.numpy()

    def blocks(self) -> TileDecoder:
        """The same completions, from here on by blocks."""
        return self

    def keep(self, rows: Tensor) -> None:
        """Drop all completions but `rows` (indices into the present batch); their caches stay where
        they are until there must be room for more."""
        self._positions = self._positions[rows]
        self._lengths = self._lengths[rows.numpy()]
        self._slots, self._members = self._slots[rows], self._members[rows]
        self._begins = self._begins[rows]

    def _room(self, owner: Tensor, positions: Tensor) -> tuple[Activations, int]:
        """Where the layers write what they compute for tokens (R,), and from which row on."""
        found = self._recorder.begin(self._members[owner], positions - self._begins[owner])
        if found is not None:
            return found
        sizes, rows = self.weights.sizes, padded_rows(len(owner))

        def scratch(name: str, *shape: int, dtype: torch.dtype = sizes.dtype) -> Tensor:
            return buffer(f"decoded {name}", (1, rows, *shape), dtype)

        return Activations(
            scratch("rows", sizes.hidden),
            scratch("stacked", sizes.heads + 2 * sizes.key_heads, sizes.head_dim),
            scratch("attended", sizes.heads * sizes.head_dim),
            scratch("lse", sizes.heads, dtype=torch.float32),
            scratch("between", sizes.hidden),
            torch.empty(0, 0, 0, dtype=sizes.dtype),
        ), 0

    def _logits(self, hidden: Tensor) -> Tensor:
        weights = self.weights
        shape = (len(hidden), odd_lines(weights.vocab, 4))
        out = buffer("decoded logits", shape, torch.float32)
        weights.head.logits(hidden, out[:, : weights.vocab])
        if weights.bias is not None:
            out[:, : weights.vocab] += weights.bias
        return out

    def _caches(self, batch: int, panels: int) -> tuple[Tensor, Tensor]:
        """Empty keys (L, B, Hkv, panels, ...) and values, see `decode_attention.store`."""
        size, shape = self.weights.size, (len(self.weights.qkv), batch, self.weights.key_heads)
        keys = torch.zeros(*shape, panels, size // self._per_word, PANEL, dtype=torch.int32)
        rest = (panels, -(-size // PANEL), PANEL // self._per_word, PANEL)
        return keys, torch.zeros(*shape, *rest, dtype=torch.int32)

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


def _norms(decoder: nn.Module) -> list[Tensor]:
    """Of attention and MLP, layer by layer, and the last."""
    found = []
    for layer in decoder.layers:
        found += [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
    return [weight.detach() for weight in (*found, decoder.norm.weight)]


def _biases(attention: nn.Module) -> np.ndarray:
    """(Hq D + 2 Hkv D,) fp32, or (0,) where projections have no bias."""
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    if linears[0].bias is None:
        return np.empty(0, np.float32)
    return torch.cat([linear.bias.detach().float() for linear in linears]).numpy()


def _panels(positions: int) -> int:
    return -(-positions // PANEL)
