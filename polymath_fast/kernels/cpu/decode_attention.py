"""Attention of tokens that are being decoded, over a packed cache of keys and values.

Keys are kept as columns of panels of 64, values as rows (in bf16 as pairs of them), which is how
the products read them; a completion's own panels lie in its cache, those of a prompt that all share
in one place.

Hkv key heads, D head size. Arrays are fp32, or bf16 that arrives as uint16; a word is what a
product counts in, one fp32 or two bf16.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from polymath_fast.kernels.cpu import panel_blocks
from polymath_fast.kernels.cpu.attention_parts import softmax, store_row
from polymath_fast.kernels.cpu.jit import BORROWED, njit
from polymath_fast.kernels.cpu.layers import rotated_head
from polymath_fast.kernels.cpu.panel_blocks import PANEL, in_tiles
from polymath_fast.kernels.cpu.tiles import low_narrow_tile, low_tile

ROWS = 3
"""queries of a tile over a completion's own keys"""
_TOGETHER = 16
"""queries that meet the prompt together"""


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


class Room(NamedTuple):
    """Scratch of one thread, for `tokens_at_once` tokens under one key head."""

    queries: np.ndarray
    scores: np.ndarray
    probs: np.ndarray
    sums: np.ndarray
    wide: np.ndarray
    """two heads in fp32"""
    new_key: np.ndarray


def make_room(stacked, group, keys, values, prompt_keys):
    """Of a decoder's arrays; group: query heads of a key head."""
    size, block = stacked.shape[2], panel_blocks.rows_of(keys)
    rows = -(-max(_TOGETHER, group) // block) * block + ROWS  # the last tile may stand out
    width = (keys.shape[3] + prompt_keys.shape[2]) * PANEL
    return Room(
        np.zeros((rows, size), stacked.dtype),
        np.empty((rows, width), np.float32),
        np.zeros((rows, width), stacked.dtype),
        np.empty((rows, values.shape[4] * PANEL), np.float32),
        np.empty(2 * size, np.float32),
        np.empty(size, stacked.dtype),
    )


@njit(**BORROWED)
def tokens_at_once(group):
    """How many tokens' queries meet the prompt together: its keys and values are read once for all
    of them, and fill the rows of a block."""
    return max(1, _TOGETHER // group)


@njit(**BORROWED)
def attend(
    first, last, b, firsts, lengths, slots, stacked, heads, head, cos, sin, norms, eps, keys,
    values, prompt_len, prompt_keys, prompt_values, scale, room, attended, lse,
):  # fmt: skip
    """Tokens [first, last), `tokens_at_once` at most, of completions from `b` on, under one key
    head: their keys and values into the caches (slots, Hkv, ...), their rows of attended (R, Hq D)
    and lse (R, Hq). Prompt and its keys and values: of this head, shared by all."""
    key_heads, size = keys.shape[1], stacked.shape[2]
    group = heads // key_heads
    base = -(-prompt_len // PANEL) * PANEL
    count = (last - first) * group
    owner = b
    for i in range(first, last):  # in order: each token sees those before it
        owner = _owner(owner, i, firsts)
        own_keys, own_values = keys[slots[owner], head], values[slots[owner], head]
        row, own = (i - first) * group, lengths[owner] + i - firsts[owner] + 1
        place(
            stacked[i], heads, head, cos[i], sin[i], norms, eps, own - 1, own_keys, own_values,
            room.wide, room.new_key, room.queries[row:],
        )  # fmt: skip
        for top in range(row, row + group, ROWS):  # rows past the token's are overwritten
            _products(room.queries[top : top + ROWS], own, own_keys, room.scores[top:, base:])
    block = panel_blocks.rows_of(prompt_keys)
    for top in range(0, count, block):
        rows = room.queries[top : top + block]
        panel_blocks.products(rows, prompt_len, prompt_keys, room.scores[top:])
    owner = b
    for i in range(first, last):
        owner = _owner(owner, i, firsts)
        row, own = (i - first) * group, lengths[owner] + i - firsts[owner] + 1
        used = base + -(-own // PANEL) * PANEL
        for g in range(group):
            scores, probs = room.scores[row + g, :used], room.probs[row + g, :used]
            total, lse[i, head * group + g] = softmax(scores, prompt_len, base, own, scale, probs)
            scores[0] = np.float32(1) / total
        own_values = values[slots[owner], head]
        for top in range(row, row + group, ROWS):
            _add_values(_low, top, base, own, own_values, room.probs, room.sums, False)
    for top in range(0, count, block):
        _add_values(_block, top, 0, prompt_len, prompt_values, room.probs, room.sums, True)
    for i in range(first, last):
        for g in range(group):
            row, left = (i - first) * group + g, (head * group + g) * size
            store_row(attended[i, left : left + size], room.sums[row], room.scores[row, 0])


@njit(inline="always")
def _owner(b, token, firsts):
    """The completion, `b` or one behind it, that a token belongs to."""
    while firsts[b + 1] <= token:
        b += 1
    return b


@njit(inline="always")
def _add_values(multiply, top, base, count, values, probs, sums, add):
    """Rows of sums from `top` on = or += probs (., keys from `base` on) times `count` values."""
    per_word = 4 // probs.itemsize
    for panel in range(-(-count // PANEL)):
        left = probs[top, base + panel * PANEL :].ctypes.data
        depth = -(-min(PANEL, count - panel * PANEL) // per_word)
        for part in range(values.shape[1]):
            place = sums[top, part * PANEL :].ctypes.data
            multiply(
                left, probs.strides[0], values[panel, part], depth, place, sums.strides[0],
                add or panel > 0,
            )  # fmt: skip


@njit(**BORROWED)
def _low(a, row_step, panel, words, out, out_step, add):
    low_tile(a, row_step, 4, panel, words, out, out_step, add)


@njit(**BORROWED)
def _block(a, row_step, panel, words, out, out_step, add):
    words = panel_blocks.whole_words(panel, words)
    panel_blocks.multiply(a, row_step, panel, words, out, out_step, add)


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
