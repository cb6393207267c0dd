"""Decoding without transformers' modules: a layer is five products and a handful of row passes.

For models whose layers the learner has fused, in bfloat16, on processors with AVX512-BF16. Logits
come out in float32, so sampled log-probs carry no rounding of the LM head.

Legend: B completions, H hidden, Hq / Hkv query and key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from polymath_fast.kernels.cpu import decode, layers, tiles
from polymath_fast.kernels.cpu.attention import PANEL
from polymath_fast.kernels.cpu.dense import stacked_or_copied
from polymath_fast.kernels.cpu.head import odd_lines
from polymath_fast.kernels.cpu.products import TileProducts, bits
from polymath_fast.kernels.cpu.threads import parallel, split
from polymath_fast.learner.policy import Policy
from polymath_fast.rollout.decode import PromptCache


def fits(policy: Policy) -> bool:
    """Whether `policy` can decode this way on this machine."""
    weight = policy.head.weight
    return (
        policy.unfused is None
        and weight.dtype == torch.bfloat16
        and weight.shape[1] % 2 == 0
        and policy.model.get_decoder().layers[0].self_attn.head_dim % tiles.LANES == 0
        and tiles.available()
    )


@dataclass(frozen=True)
class _Layer:
    """Weights of one decoder layer as its products and passes read them."""

    input_norm: np.ndarray
    qkv: Tensor  # (H, (Hq + 2 Hkv) D)
    qkv_bias: Tensor | None
    head_norms: np.ndarray  # (Hq + Hkv, D), or (0, 1)
    output: Tensor  # (Hq D, H)
    mlp_norm: np.ndarray
    gate_up: Tensor  # (H, 2 I)
    down: Tensor  # (I, H)


class TileWeights:
    """A policy's weights as they are now, for the decoders of one round of sampling."""

    def __init__(self, policy: Policy):
        decoder = policy.model.get_decoder()
        attention = decoder.layers[0].self_attn
        self.size, self.scale = attention.head_dim, np.float32(attention.scaling)
        self.key_heads = attention.k_proj.weight.shape[0] // self.size
        self.heads = attention.q_proj.weight.shape[0] // self.size
        self.eps = np.float32(decoder.norm.variance_epsilon)
        self.layers = [self._layer(layer) for layer in decoder.layers]
        self.norm = bits(decoder.norm.weight.detach())
        self.embedding = decoder.embed_tokens
        self.rotary = decoder.rotary_emb
        self.products = TileProducts(policy.head.weight.detach())
        self.bias = policy.head.bias
        self.vocab = len(policy.head.weight)

    def _layer(self, layer: nn.Module) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [projection.bias for projection in projections]
        return _Layer(
            input_norm=bits(layer.input_layernorm.weight.detach()),
            qkv=stacked_or_copied([p.weight for p in projections]).t(),
            qkv_bias=None if biases[0] is None else torch.cat(biases).detach(),
            head_norms=self._head_norms(attention),
            output=attention.o_proj.weight.detach().t(),
            mlp_norm=bits(layer.post_attention_layernorm.weight.detach()),
            gate_up=stacked_or_copied([mlp.gate_proj.weight, mlp.up_proj.weight]).t(),
            down=mlp.down_proj.weight.detach().t(),
        )

    def _head_norms(self, attention: nn.Module) -> np.ndarray:
        if getattr(attention, "q_norm", None) is None:
            return np.empty((0, 1), np.float32)
        q, k = (norm.weight.detach().float() for norm in (attention.q_norm, attention.k_norm))
        rows = [q.expand(self.heads, -1), k.expand(self.key_heads, -1)]
        return torch.cat(rows).numpy()


class TileDecoder:
    """B completions that grow in lock step; see `decode.ModuleDecoder` for the same on modules."""

    def __init__(self, weights: TileWeights, prefilled: Sequence[tuple[PromptCache, Tensor]]):
        """`prefilled[i]` is the prompt that completion i continues and its last hidden state."""
        self.weights = weights
        self._last = torch.cat([hidden for _, hidden in prefilled])  # (B, H)
        prompts = [prompt for prompt, _ in prefilled]
        self._positions = torch.tensor([prompt.length for prompt in prompts])
        self._shared = prompts[0] if all(prompt is prompts[0] for prompt in prompts) else None
        own = torch.zeros_like(self._positions) if self._shared else self._positions.clone()
        self._lengths = own.numpy()  # (B,) positions of the own cache that are filled
        self._prompt_len = self._shared.length if self._shared else 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._prompt: list[tuple[np.ndarray, np.ndarray]] = []
        for layer in range(len(weights.layers)):
            self._fill(layer, prompts, _panels(int(own.max()) + 1))

    def first(self) -> Tensor:
        """(B, V + padding) float32 logits of the tokens that follow the prompts."""
        return self._logits(self._last)

    def next(self, tokens: Tensor) -> Tensor:
        """(B, V + padding) float32 logits after one more token (B,) a completion."""
        weights = self.weights
        self._make_room()
        hidden = weights.embedding(tokens)
        cos, sin = weights.rotary(hidden[:, None], self._positions[:, None])
        rotation = bits(cos[:, 0].contiguous()), bits(sin[:, 0].contiguous())
        for number, layer in enumerate(weights.layers):
            hidden = self._layer(number, layer, hidden, rotation)
        self._positions += 1
        self._lengths += 1
        return self._logits(self._normed(hidden, weights.norm))

    def keep(self, rows: Tensor) -> None:
        """Drop all completions but `rows` (indices into the present batch)."""
        self._positions = self._positions[rows]
        self._lengths = self._lengths[rows.numpy()]
        for cache in (self._keys, self._values):
            for layer, tensor in enumerate(cache):
                cache[layer] = tensor.index_select(0, rows)

    def _layer(
        self, number: int, layer: _Layer, hidden: Tensor, rotation: tuple[np.ndarray, np.ndarray]
    ) -> Tensor:
        weights, batch = self.weights, len(hidden)
        normed = self._normed(hidden, layer.input_norm)
        if layer.qkv_bias is None:
            stacked = torch.mm(normed, layer.qkv)
        else:
            stacked = torch.addmm(layer.qkv_bias, normed, layer.qkv)
        attended = torch.empty(batch, weights.heads * weights.size, dtype=hidden.dtype)
        parallel(
            decode.attend,
            split(batch * weights.key_heads, per_thread=2),
            bits(stacked.view(batch, -1, weights.size)),
            weights.heads,
            *rotation,
            layer.head_norms,
            weights.eps,
            self._lengths,
            _words(self._keys[number]),
            _words(self._values[number]),
            self._prompt_len,
            *self._prompt[number],
            weights.scale,
            bits(attended.view(batch, weights.heads, weights.size)),
        )
        hidden = torch.addmm(hidden, attended, layer.output)
        gate_up = torch.mm(self._normed(hidden, layer.mlp_norm), layer.gate_up)
        active = torch.empty(batch, gate_up.shape[1] // 2, dtype=hidden.dtype)
        parallel(layers.swiglu, split(batch, per_thread=1), bits(gate_up), bits(active))
        return torch.addmm(hidden, active, layer.down)

    def _normed(self, hidden: Tensor, weight: np.ndarray) -> Tensor:
        out = torch.empty_like(hidden)
        layers.rms_norm(0, len(hidden), bits(hidden), weight, self.weights.eps, bits(out))
        return out

    def _logits(self, hidden: Tensor) -> Tensor:
        weights = self.weights
        out = torch.empty(len(hidden), odd_lines(weights.vocab, 4))
        weights.products.logits(hidden, out[:, : weights.vocab])
        if weights.bias is not None:
            out[:, : weights.vocab] += weights.bias
        return out

    def _fill(self, layer: int, prompts: Sequence[PromptCache], panels: int) -> None:
        """Empty caches, or ones that begin with the prompts where completions share none."""
        batch, heads, size = len(prompts), self.weights.key_heads, self.weights.size
        self._keys.append(_cache(batch, heads, panels, size // 2))
        self._values.append(_cache(batch, heads, panels, -(-size // PANEL), PANEL // 2))
        common = _panels(self._prompt_len)
        prompt = (
            _cache(1, heads, common, size // 2),
            _cache(1, heads, common, -(-size // PANEL), PANEL // 2),
        )
        if self._shared:
            self._store(layer, self._shared, *(tensor[0] for tensor in prompt))
        else:
            for row, each in enumerate(prompts):
                self._store(layer, each, self._keys[layer][row], self._values[layer][row])
        self._prompt.append(tuple(_words(tensor)[0] for tensor in prompt))

    def _store(self, layer: int, prompt: PromptCache, keys: Tensor, values: Tensor) -> None:
        rows = (
            bits(cache[layer][0].transpose(0, 1).contiguous())
            for cache in (prompt.keys, prompt.values)
        )
        decode.store(0, self.weights.key_heads, *rows, 0, _words(keys), _words(values))

    def _make_room(self) -> None:
        panels = self._keys[0].shape[2]
        if int(self._lengths.max()) < panels * PANEL:
            return
        for cache in (self._keys, self._values):
            for layer, tensor in enumerate(cache):
                more = tensor.new_zeros(*tensor.shape[:2], -(-panels // 2), *tensor.shape[3:])
                cache[layer] = torch.cat([tensor, more], dim=2)


def _panels(positions: int) -> int:
    return -(-positions // PANEL)


def _cache(batch: int, heads: int, panels: int, *rest: int) -> Tensor:
    return torch.zeros(batch, heads, panels, *rest, PANEL, dtype=torch.int32)


def _words(tensor: Tensor) -> np.ndarray:
    return tensor.numpy().view(np.uint32)
