"""Keys and values of completions that decode in tiles, packed as `decode_attention.store` does.

Each completion has a place of its own, which stays where it is while there is room; what branches
is copied. A prompt that all continue is stored once, beside them.

Legend: B completions, L layers, Hkv key heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from polymath_fast.kernels.cpu.decode_attention import store
from polymath_fast.kernels.cpu.operands import bits
from polymath_fast.kernels.cpu.panel_blocks import PANEL
from polymath_fast.kernels.cpu.workspace import claim
from polymath_fast.rollout.decode import PromptCache
from polymath_fast.rollout.tile_weights import TileWeights

_AT_ONCE = 2**28
"""bytes of caches that are made at their full length; larger ones grow with the completions"""


class TileCache:
    """What `decode.step` reads and writes; completions may differ in length."""

    def __init__(
        self, weights: TileWeights, prompts: Sequence[PromptCache], tokens: int, most: int
    ):
        """Completion i continues prompts[i]; there will probably be `most` completions of `tokens`
        tokens of their own at most."""
        self._weights = weights
        self._per_word = 4 // weights.sizes.dtype.itemsize
        shared = prompts[0] if all(prompt is prompts[0] for prompt in prompts) else None
        self._prompt_len = shared.length if shared else 0
        filled = [0 if shared else prompt.length for prompt in prompts]
        self._lengths = np.array(filled, np.int64)  # (B,) positions of a place that are filled
        most, longest = max(most, len(prompts)), max(filled)
        self._keys, self._values = self._first(most, longest + 1, longest + tokens)
        self._slots = torch.arange(len(prompts))  # (B,) places of the completions
        prompt_keys, prompt_values = self._empty(1, _panels(self._prompt_len))
        self._prompt_keys, self._prompt_values = prompt_keys[:, 0], prompt_values[:, 0]
        if shared:
            self._store(shared, self._prompt_keys, self._prompt_values)
        else:
            for row, prompt in enumerate(prompts):
                self._store(prompt, self._keys[:, row], self._values[:, row])

    def operands(self) -> tuple[np.ndarray | int, ...]:
        """What `decode.step` takes, from `lengths` to `prompt_values`."""
        own = (self._lengths, self._slots.numpy(), *map(self._words, (self._keys, self._values)))
        return *own, self._prompt_len, *map(self._words, (self._prompt_keys, self._prompt_values))

    def make_room(self, counts: Tensor) -> None:
        """For counts (B,) more tokens."""
        panels = self._keys.shape[3]
        missing = _panels(int((self._lengths + counts.numpy()).max())) - panels
        if missing <= 0:
            return
        more = self._empty(len(self._slots), max(missing, -(-panels // 2)))
        kept = (cache.index_select(1, self._slots) for cache in (self._keys, self._values))
        pairs = zip(kept, more, strict=True)
        self._keys, self._values = (torch.cat(pair, dim=3) for pair in pairs)
        self._slots = torch.arange(len(self._slots))

    def advance(self, counts: Tensor) -> None:
        """Counts (B,) of the tokens written last are there to stay."""
        self._lengths += counts.numpy()

    def keep(self, rows: Tensor) -> None:
        """Go on with completions `rows`, one that is named more than once as several."""
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
        """`slots` (B,), where those marked in `copies` (B,) are copied to `free` places."""
        count, used = int(copies.sum()), _panels(int(self._lengths.max()))
        missing = count - len(free)
        if missing > 0:
            first, panels = self._keys.shape[1], self._keys.shape[3]
            more = self._empty(max(missing, first // 2), panels)
            pairs = zip((self._keys, self._values), more, strict=True)
            self._keys, self._values = (torch.cat(pair, dim=1) for pair in pairs)
            free = torch.cat([free, torch.arange(first, self._keys.shape[1])])
        sources, targets = slots[copies], free[:count]
        for cache in (self._keys, self._values):
            cache[:, targets, :, :used] = cache[:, sources, :, :used]
        self._values[:, targets, :, used:] = 0  # 0 times what a completion left might be NaN
        return slots.masked_scatter(copies, targets)

    def _first(self, places: int, least: int, most: int) -> tuple[Tensor, Tensor]:
        """With room for `most` positions in each place, in scratch memory, unless that is much at
        once."""
        shapes = self._shapes(places, _panels(most))
        if sum(4 * math.prod(shape) for shape in shapes) > _AT_ONCE:
            return self._empty(places, _panels(least))
        names = ("decoded keys", "decoded values")
        keys, values = (claim(n, s, torch.int32) for n, s in zip(names, shapes, strict=True))
        return keys.zero_(), values.zero_()

    def _empty(self, places: int, panels: int) -> tuple[Tensor, Tensor]:
        keys, values = self._shapes(places, panels)
        return torch.zeros(keys, dtype=torch.int32), torch.zeros(values, dtype=torch.int32)

    def _shapes(self, places: int, panels: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of keys and values, (L, places, Hkv, panels, ...)."""
        sizes, per_word = self._weights.sizes, self._per_word
        size, shape = sizes.head_dim, (sizes.layers, places, sizes.key_heads, panels)
        keys = (*shape, size // per_word, PANEL)
        return keys, (*shape, -(-size // PANEL), PANEL // per_word, PANEL)

    def _store(self, prompt: PromptCache, keys: Tensor, values: Tensor) -> None:
        """The prompt's keys and values of all layers into one place."""
        for layer in range(len(keys)):
            rows = (
                bits(cache[layer][0].transpose(0, 1).contiguous())
                for cache in (prompt.keys, prompt.values)
            )
            places = (self._words(x[layer]) for x in (keys, values))
            store(0, self._weights.sizes.key_heads, *rows, 0, *places)

    def _words(self, cache: Tensor) -> np.ndarray:
        return cache.numpy().view(self._weights.qkv.dtype)


def _panels(positions: int) -> int:
    return -(-positions // PANEL)
