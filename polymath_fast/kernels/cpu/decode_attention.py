"""Attention of tokens that are being decoded, over a packed cache of keys and values.

Keys are kept as columns of panels of 64, values as rows (in bf16 as pairs of them), which is how
the products read them; a completion's own panels lie in its cache, those of a prompt that all share
in one place.

Hkv key heads, D head size. Arrays are fp32, or bf16 that arrives as uint16; a word is what a
product counts in, one fp32 or two bf16.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from polymath_fast.kernels.cpu.attention_parts import softmax, store_row
from polymath_fast.kernels.cpu.borrowed import BORROWED
from polymath_fast.kernels.cpu.layers import rotated_head
from polymath_fast.kernels.cpu.panel_blocks import PANEL, in_tiles
from polymath_fast.kernels.cpu.tiles import low_narrow_tile, low_tile

ROWS = 3
"""queries of a tile"""


@njit(**BORROWED)
def store(start, stop, k, v, first, keys, values):
    """Keys and values of rows k, v (T, Hkv, D) into positions [first, first + T) of one completion;
    a range of heads.

    keys (Hkv, panels, D words, 64) and values (Hkv, panels, D panels, 64 positions, 64) of words, a
    pair of positions to a word in bf16.
    """
    for head in range(start, stop):
        for row in range(k.shape[0]):
            _store_key(k[row, head].view(keys.dtype), first + row, keys[head])
            _store_value(v[row, head], first + row, values[head])


@njit(**BORROWED)
def place(
    stacked, heads, head, cos, sin, norms, eps, position, keys, values, wide, new_key, queries
):  # fmt: skip
    """Rotated queries of one key head, and its new key and value in the cache; wide (2 D,) fp32 and
    new_key (D,) are scratch."""
    key_heads = (stacked.shape[0] - heads) // 2
    group = heads // key_heads
    first = head * group
    for g in range(group):
        rotated_head(stacked[first + g], first + g, cos, sin, norms, eps, wide, queries[g])
    rotated_head(stacked[heads + head], heads + head, cos, sin, norms, eps, wide, new_key)
    _store_key(new_key.view(keys.dtype), position, keys)
    _store_value(stacked[heads + key_heads + head], position, values)


@njit(**BORROWED)
def attend(
    queries, group, own, keys, values, prompt_len, prompt_keys, prompt_values, scale, scores, probs,
    sums, out, lse,
):  # fmt: skip
    """out (group D), lse (group,): attention of one key head's queries over prompt and `own` keys
    of its own."""
    base = -(-prompt_len // PANEL) * PANEL
    used = base + -(-own // PANEL) * PANEL
    size, per_word = queries.shape[1], 4 // queries.itemsize
    for top in range(0, group, ROWS):
        height = min(ROWS, group - top)
        some = queries[top : top + ROWS]
        _products(some, prompt_len, prompt_keys, scores)
        _products(some, own, keys, scores[:, base:])
        for r in range(height):
            total, lse[top + r] = softmax(
                scores[r, :used], prompt_len, base, own, scale, probs[r, :used]
            )
            scores[r, 0] = np.float32(1) / total
        for panel in range(used // PANEL):
            first_own = base // PANEL
            rows = prompt_values[panel] if panel < first_own else values[panel - first_own]
            end = prompt_len if panel < first_own else base + own
            depth = -(-min(PANEL, end - panel * PANEL) // per_word)
            left = probs.ctypes.data + probs.itemsize * PANEL * panel
            for part in range(rows.shape[0]):
                low_tile(
                    left, probs.strides[0], 4, rows[part], depth,
                    sums.ctypes.data + 4 * part * PANEL, sums.strides[0], panel > 0,
                )  # fmt: skip
        for r in range(height):
            row = out[(top + r) * size : (top + r + 1) * size]
            store_row(row, sums[r], scores[r, 0])


@njit(**BORROWED)
def _products(rows, count, panels, out):
    in_tiles(low_tile, low_narrow_tile, rows, count, panels, out)


@njit(**BORROWED)
def _store_key(row, position, keys):
    panel, column = position // PANEL, position % PANEL
    for word in range(row.size):
        keys[panel, word, column] = row[word]


def _store_value(row, position, values):
    raise NotImplementedError("compiled code only")


@overload(_store_value, jit_options=BORROWED)
def _compiled_store_value(row, position, values):
    if row.dtype == types.uint16:

        def store(row, position, values):
            panel, within = position // PANEL, position % PANEL
            halves = values.view(np.uint16)  # of a word, the low one from the even position
            for d in range(row.size):
                halves[panel, d // PANEL, within // 2, 2 * (d % PANEL) + within % 2] = row[d]
    else:

        def store(row, position, values):
            panel, within = position // PANEL, position % PANEL
            for d in range(row.size):
                values[panel, d // PANEL, within, d % PANEL] = row[d]

    return store
