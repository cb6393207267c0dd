"""Keys and values of the embedded sampler: a prompt is computed once, whoever continues it.

On the CPU the completions of one prompt read its keys and values in place; elsewhere, and when
completions of different prompts decode together, each completion carries a copy, aligned right.

Legend: B completions, P prompt tokens, Hq / Hkv query and key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from polymath_fast.kernels import prefix_attention
from polymath_fast.learner.policy import Policy
from polymath_fast.rollout.block_cache import BlockCache

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_GROWTH = 64  # tokens by which the buffers grow


@dataclass
class PromptCache:
    """Prefill of one prompt: keys and values (1, Hkv, P, D) of every layer."""

    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    length: int = 0

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """(1, Hq, P, D) queries over themselves, causally -> (1, P, Hq, D)."""
        self.keys[layer_idx], self.values[layer_idx] = k, v
        self.length = k.shape[2]
        rows = (x[0].transpose(0, 1) for x in (q, k, v))  # as the learner's pass, bit for bit
        nobody = torch.zeros(2, dtype=torch.int32)
        return prefix_attention(*rows, self.length, nobody, scale=scale).unsqueeze(0)


class DecodeCache:
    """B completions that grow one token at a time, in lock step."""

    def __init__(self, prompts: Sequence[PromptCache]):
        """`prompts[i]` is what completion i continues; the same object again and again is fine."""
        first = prompts[0]
        alone = all(prompt is first for prompt in prompts)
        on_cpu = next(iter(first.keys.values())).device.type == "cpu"
        self.prompt = first if alone and on_cpu else None
        self.positions = torch.tensor([prompt.length for prompt in prompts])  # (B,) of the next
        self.batch = len(prompts)
        self.length = 0  # columns of `keys` that are filled
        self.mask: Tensor | None = None  # (B, 1, 1, width) True where a column is a real token
        self.keys: dict[int, Tensor] = {}  # (B, Hkv, capacity, D)
        self.values: dict[int, Tensor] = {}
        if self.prompt is None:
            self._copy_prompts(prompts)

    def _copy_prompts(self, prompts: Sequence[PromptCache]) -> None:
        self.length = int(self.positions.max())
        device = next(iter(prompts[0].keys.values())).device
        columns = torch.arange(self.length)[None]
        real = columns >= (self.length - self.positions)[:, None]
        self.mask = real[:, None, None].to(device)
        for name in ("keys", "values"):
            for layer in prompts[0].keys:
                rows = (getattr(prompt, name)[layer] for prompt in prompts)
                aligned = [pad(x, (0, 0, self.length - x.shape[2], 0)) for x in rows]
                getattr(self, name)[layer] = torch.cat(aligned)

    def keep(self, rows: Tensor) -> None:
        """Drop all completions but `rows` (indices into the present batch)."""
        self.batch = len(rows)
        self.positions = self.positions[rows.cpu()]
        self.mask = None if self.mask is None else self.mask[rows]
        for buffers in (self.keys, self.values):
            for layer, buffer in buffers.items():
                buffers[layer] = buffer.index_select(0, rows)

    def advance(self) -> None:
        """Every layer has stored the present token; move on to the next."""
        self.length += 1
        self.positions = self.positions + 1

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """(B, Hq, 1, D) queries over prompt and own past -> (B, 1, Hq, D)."""
        keys = self._append(self.keys, layer_idx, k)
        values = self._append(self.values, layer_idx, v)
        if self.prompt is not None:
            return self._with_shared_prompt(layer_idx, q, keys, values, scale).transpose(1, 2)
        mask = pad(self.mask, (0, keys.shape[2] - self.mask.shape[3]), value=True)
        folded = _by_key_head(q, keys)
        out = scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
        return out.reshape(q.shape).transpose(1, 2)

    def _append(self, buffers: dict[int, Tensor], layer_idx: int, new: Tensor) -> Tensor:
        buffer = buffers.get(layer_idx)
        if buffer is None:
            buffer = new.new_empty((self.batch, new.shape[1], _GROWTH, new.shape[3]))
        if buffer.shape[2] == self.length:
            buffer = pad(buffer, (0, 0, 0, _GROWTH))
        buffers[layer_idx] = buffer
        buffer[:, :, self.length] = new[:, :, 0]
        return buffer[:, :, : self.length + 1]

    def _with_shared_prompt(
        self, layer_idx: int, q: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        own, own_lse = _flash(_by_key_head(q, keys), keys, values, 0.0, False, scale=scale)
        own, own_lse = own.reshape(q.shape), own_lse.reshape(q.shape[:3])
        together = q[:, :, 0].transpose(0, 1).unsqueeze(0)  # (1, Hq, B, D): one read of the prompt
        shared, lse = _flash(
            together,
            self.prompt.keys[layer_idx],
            self.prompt.values[layer_idx],
            0.0,
            False,
            scale=scale,
        )
        shared = shared[0].transpose(0, 1).unsqueeze(2)
        share = torch.sigmoid(own_lse - lse[0].transpose(0, 1).unsqueeze(2)).unsqueeze(-1)
        wide = share.dtype
        return torch.lerp(shared.to(wide), own.to(wide), share).to(q.dtype)


def _by_key_head(q: Tensor, keys: Tensor) -> Tensor:
    """(B, Hq, 1, D) -> (B, Hkv, Hq / Hkv, D): the heads that share a key head read it together."""
    return q.reshape(q.shape[0], keys.shape[1], -1, q.shape[3])


class ModuleDecoder:
    """B completions that grow in lock step through the policy's own modules."""

    shrink_below = 0.8  # dropping one copies the caches of all others

    def __init__(self, policy: Policy, prefilled: Sequence[tuple[PromptCache, Tensor]]):
        """`prefilled[i]` is the prompt that completion i continues and its last hidden state."""
        self._policy = policy
        self._last = torch.cat([hidden for _, hidden in prefilled])  # (B, H)
        self._cache = DecodeCache([prompt for prompt, _ in prefilled])

    def first(self) -> Tensor:
        """(B, V) logits of the tokens that follow the prompts."""
        return self._policy.head(self._last)

    def next(self, tokens: Tensor) -> Tensor:
        """(B, V) logits after one more token (B,) a completion."""
        device = self._policy.device
        hidden = run_decoder(
            self._policy,
            tokens[:, None].to(device),
            self._cache.positions[:, None].to(device),
            self._cache,
        )
        self._cache.advance()
        return self._policy.head(hidden[:, 0])

    def keep(self, rows: Tensor) -> None:
        """Drop all completions but `rows` (indices into the present batch)."""
        self._cache.keep(rows.to(self._policy.device))

    def blocks(self) -> ModuleBlocks:
        """The same completions, from here on by blocks; this decoder is not used again."""
        return ModuleBlocks(self._policy, BlockCache(self._cache))


class ModuleBlocks:
    """B completions that grow by blocks through the policy's own modules."""

    def __init__(self, policy: Policy, cache: BlockCache):
        self._policy, self._cache = policy, cache

    def block(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """(R, V) logits after each of tokens (R,), of which counts (B,) belong to a completion."""
        device = self._policy.device
        positions = self._cache.begin(counts)[None].to(device)
        hidden = run_decoder(self._policy, tokens[None].to(device), positions, self._cache)
        return self._policy.head(hidden[0])

    def advance(self, kept: Tensor) -> None:
        """Keep the first kept (B,) tokens of each completion's block."""
        self._cache.advance(kept)

    def keep(self, rows: Tensor) -> None:
        """Drop all completions but `rows` (indices into the present batch)."""
        self._cache.keep(rows)


def run_decoder(
    policy: Policy, ids: Tensor, positions: Tensor, cache: PromptCache | DecodeCache | BlockCache
) -> Tensor:
    """(B, T, H) hidden states of ids (B, T); keys and values go to `cache`."""
    return policy.model.get_decoder()(
        input_ids=ids, position_ids=positions, use_cache=False, decode=cache
    ).last_hidden_state
