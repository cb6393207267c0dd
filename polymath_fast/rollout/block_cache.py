"""Keys and values of completions that grow by several tokens at once, each by another number.

A pass takes a block of tokens of every completion. Its rows lie one after the other, so products
have no padding; only attention puts them side by side. A block may be taken back in part: the next
one overwrites it.

Legend: B completions, R rows of a pass, T the longest block, Hq / Hkv query and key heads, D head
size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

if TYPE_CHECKING:
    from polymath_fast.rollout.decode import DecodeCache

_GROWTH = 64  # tokens by which the buffers grow


class BlockCache:
    """Goes on where a `DecodeCache` stopped; every completion has its own copy of the prompt."""

    def __init__(self, cache: DecodeCache):
        self.positions = cache.positions.clone()  # (B,) of the next token
        own = {"keys": cache.keys, "values": cache.values}
        self._buffers = {name: self._joined(cache, name, own[name]) for name in own}
        first = next(iter(self._buffers["keys"].values()))
        self._device = first.device
        stored = cache.length + (cache.prompt.length if cache.prompt else 0)
        self._ends = torch.full((cache.batch,), stored)  # (B,) column of the next token
        self._owner = self._offset = self._column = torch.empty(0, dtype=torch.int64)
        self._mask = first.new_empty(0)

    @staticmethod
    def _joined(cache: DecodeCache, name: str, own: dict[int, Tensor]) -> dict[int, Tensor]:
        """(B, Hkv, columns, D) of every layer: prompt and past."""
        joined = {layer: buffer[:, :, : cache.length] for layer, buffer in own.items()}
        if cache.prompt is not None:
            for layer, shared in getattr(cache.prompt, name).items():
                copies = shared.expand(cache.batch, -1, -1, -1)
                past = joined.get(layer, copies[:, :, :0])
                joined[layer] = torch.cat([copies, past], dim=2)
        return joined

    def begin(self, counts: Tensor) -> Tensor:
        """Make room for counts (B,) tokens after what is kept; (R,) positions of the rows."""
        owner = torch.arange(len(counts)).repeat_interleave(counts)
        first = counts.cumsum(0) - counts
        offset = torch.arange(len(owner)) - first[owner]
        width, longest = int((self._ends + counts).max()), int(counts.max())
        # Columns of a completion begin where its position 0 is: copied prompts are aligned right.
        start = (self._ends - self.positions)[:, None, None]
        columns = torch.arange(width)[None, None]
        last = self._ends[:, None, None] + torch.arange(longest)[None, :, None]
        self._mask = ((columns >= start) & (columns <= last)).to(self._device)  # (B, T, width)
        self._owner, self._offset = owner.to(self._device), offset.to(self._device)
        self._column = (self._ends[owner] + offset).to(self._device)
        for buffers in self._buffers.values():
            for layer, buffer in buffers.items():
                short = width - buffer.shape[2]
                if short > 0:  # with zeros: a masked column may hold anything but NaN
                    buffers[layer] = pad(buffer, (0, 0, 0, short + _GROWTH))
        return self.positions[owner] + offset

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """(1, Hq, R, D) queries over prompt, past and their own block -> (1, R, Hq, D)."""
        batch, longest, width = self._mask.shape
        keys, values = (self._buffers[name][layer_idx] for name in ("keys", "values"))
        keys[self._owner, :, self._column] = k[0].transpose(0, 1)
        values[self._owner, :, self._column] = v[0].transpose(0, 1)
        heads, key_heads, size = q.shape[1], k.shape[1], q.shape[3]
        side_by_side = q.new_zeros(batch, longest, heads, size)
        side_by_side[self._owner, self._offset] = q[0].transpose(0, 1)
        # Heads that share a key head read it together.
        folded = side_by_side.transpose(1, 2).reshape(batch, key_heads, -1, size)
        mask = self._mask[:, None].repeat(1, 1, heads // key_heads, 1)
        out = scaled_dot_product_attention(
            folded, keys[:, :, :width], values[:, :, :width], attn_mask=mask, scale=scale
        )
        out = out.reshape(batch, heads, longest, size).transpose(1, 2)
        return out[self._owner, self._offset].unsqueeze(0)

    def advance(self, kept: Tensor) -> None:
        """Keep the first kept (B,) tokens of each completion's block."""
        self._ends = self._ends + kept
        self.positions = self.positions + kept

    def keep(self, rows: Tensor) -> None:
        """Drop all completions but `rows` (indices into the present batch)."""
        self._ends, self.positions = self._ends[rows], self.positions[rows]
        for buffers in self._buffers.values():
            for layer, buffer in buffers.items():
                buffers[layer] = buffer.index_select(0, rows.to(self._device))
