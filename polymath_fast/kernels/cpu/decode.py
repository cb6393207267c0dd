"""Decoding on a CPU in AVX512-BF16 tiles: one new token a completion, a packed KV cache.

Keys are kept as columns of panels of 64, values as pairs of rows, which is how the products read
them; a completion's own panels lie in the cache, those of a prompt that all share in one place.

B completions, Hq / Hkv query and key heads, D head size. Every array of bf16 arrives as uint16.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from polymath_fast.kernels.cpu import attention
from polymath_fast.kernels.cpu.attention import PANEL, ROWS
from polymath_fast.kernels.cpu.layers import rotated_head
from polymath_fast.kernels.cpu.tiles import square_tile


@njit(nogil=True, cache=True)
def store(start, stop, k, v, first, keys, values):
    """Keys and values of rows k, v (T, Hkv, D) into positions [first, first + T) of one completion;
    a range of heads.

    keys (Hkv, panels, D / 2, 64) words, values (Hkv, panels, D panels, 32, 64) words.
    """
    for head in range(start, stop):
        for row in range(k.shape[0]):
            _store_key(k[row, head].view(np.uint32), first + row, keys[head])
            _store_value(v[row, head], first + row, values[head].view(np.uint16))


@njit(nogil=True, cache=True)
def attend(
    start, stop, stacked, heads, cos, sin, norms, eps, lengths, keys, values, prompt_len,
    prompt_keys, prompt_values, scale, out,
):  # fmt: skip
    """Rotate the new queries and keys, store keys and values, attend; a range of (B, Hkv).

    stacked (B, Hq + 2 Hkv, D) projections of the new tokens; lengths (B,) positions filled before.
    keys (B, Hkv, panels, D / 2, 64), values (B, Hkv, panels, D panels, 32, 64); prompt_keys and
    prompt_values alike without B, prompt_len 0: there is no shared prompt. out (B, Hq, D).
    """
    size = stacked.shape[2]
    key_heads = keys.shape[1]
    group = heads // key_heads
    parts = values.shape[3]
    width = (keys.shape[2] + prompt_keys.shape[1]) * PANEL
    rows = np.zeros((-(-group // ROWS) * ROWS, size), np.uint16)
    new_key = np.empty(size, np.uint16)
    wide = np.empty(size, np.float32)
    scores = np.empty((ROWS, width), np.float32)
    probs = np.zeros((ROWS, width), np.uint16)
    sums = np.empty((ROWS, parts * PANEL), np.float32)
    totals = np.empty(ROWS, np.float32)
    base = -(-prompt_len // PANEL) * PANEL
    for task in range(start, stop):
        i, head = divmod(task, key_heads)
        first = head * group
        for g in range(group):
            rotated_head(
                stacked[i, first + g], first + g, cos[i], sin[i], norms, eps, wide, rows[g]
            )
        at = heads + head
        rotated_head(stacked[i, at], at, cos[i], sin[i], norms, eps, wide, new_key)
        position = lengths[i]
        _store_key(new_key.view(np.uint32), position, keys[i, head])
        value = stacked[i, heads + key_heads + head]
        _store_value(value, position, values[i, head].view(np.uint16))
        panels = position // PANEL + 1
        used = base + panels * PANEL
        for top in range(0, group, ROWS):
            some = rows[top : top + ROWS]
            attention.products(
                some, prompt_keys[head], base // PANEL, keys[i, head], panels, scores
            )
            height = min(ROWS, group - top)
            for r in range(height):
                total, _ = attention.softmax(
                    scores[r, :used], prompt_len, base, position + 1, scale, probs[r, :used]
                )
                totals[r] = np.float32(1) / total
            for panel in range(used // PANEL):
                if panel < base // PANEL:
                    block = prompt_values[head, panel]
                else:
                    block = values[i, head, panel - base // PANEL]
                left = probs.ctypes.data + 2 * PANEL * panel
                for part in range(parts):
                    place = sums.ctypes.data + 4 * part * PANEL
                    right = block[part].ctypes.data
                    square_tile(
                        left, probs.strides[0], 4, right, PANEL // 2, place, sums.strides[0],
                        panel > 0,
                    )  # fmt: skip
            for r in range(height):
                attention.store_row(out[i, first + top + r], sums[r], totals[r])


@njit(nogil=True, cache=True)
def _store_key(words, position, keys):
    panel, column = position // PANEL, position % PANEL
    for pair in range(words.size):
        keys[panel, pair, column] = words[pair]


@njit(nogil=True, cache=True)
def _store_value(row, position, values):
    """values (panels, D panels, 32, 128): the halves of 64 words, low half from the even row."""
    panel, within = position // PANEL, position % PANEL
    for d in range(row.size):
        values[panel, d // PANEL, within // 2, 2 * (d % PANEL) + within % 2] = row[d]
