"""Attention over a shared prompt in AVX512-BF16 tiles: forward and backward of one key head.

A task is one segment (the prompt, or one completion) under one key head with all its query heads.
Scores, probabilities and their gradients of a few query rows live in scratch memory that stays in
the cache. Sums are fp32; what enters a product is rounded to bf16.

Keys are counted in panels of 64: those of the prompt first, where a segment sees them, then the
segment's own. Every array of bf16 arrives as uint16.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from polymath_fast.kernels.cpu.layers import copy_row
from polymath_fast.kernels.cpu.scalar import exp, maximum, put, value
from polymath_fast.kernels.cpu.tiles import LANES, square_tile, word_at, zip_words

ROWS = 6
PANEL = 64
CHUNK = 96
"""query rows whose probabilities the backward pass holds before it multiplies by them"""
_FAST = {"reassoc", "nsz", "contract", "arcp"}


@njit(nogil=True, cache=True)
def pack_columns(rows, first, count, head, out):
    """out (panels, D / 2, 64) words: rows [first, first + count) of `rows` (T, H, D) as columns."""
    pairs = rows.shape[2] // 2
    for panel in range(-(-count // PANEL)):
        block = out[panel]
        for column in range(PANEL):
            row = panel * PANEL + column
            if row < count:
                place = _address(rows, first + row, head)
                for pair in range(pairs):
                    block[pair, column] = word_at(place + 4 * pair)
            else:
                for pair in range(pairs):
                    block[pair, column] = 0


@njit(nogil=True, cache=True)
def pack_rows(rows, first, count, head, out):
    """out (D panels, whole panels of rows / 2, 64) words: neighbouring rows, interleaved."""
    size = rows.shape[2]
    zeros = np.zeros(size, np.uint16)
    for pair in range(-(-count // PANEL) * PANEL // 2):
        low, high = zeros.ctypes.data, zeros.ctypes.data
        if 2 * pair < count:
            low = _address(rows, first + 2 * pair, head)
        if 2 * pair + 1 < count:
            high = _address(rows, first + 2 * pair + 1, head)
        for column in range(0, size, LANES):
            place = out[column // PANEL, pair].ctypes.data + 4 * (column % PANEL)
            zip_words(low + 2 * column, high + 2 * column, place)


@njit(nogil=True, cache=True)
def pack_prompt(start, stop, rows, count, columns, pairs):
    """Both packings of the prompt, one entry of `columns` and `pairs` a head; a range of heads."""
    for head in range(start, stop):
        pack_columns(rows, 0, count, head, columns[head])
        pack_rows(rows, 0, count, head, pairs[head])


@njit(nogil=True, cache=True)
def forward(
    start, stop, q, k, v, table, prompt_len, prompt_keys, prompt_values, scale, most, out, lse
):
    """Tasks [start, stop): out (Tq, Hq, D) and lse (Tq, Hq) of their rows.

    table (segments, 4): first query row, rows, first key row, whether the segment sees the prompt.
    prompt_keys (Hkv, panels, D / 2, 64), prompt_values (Hkv, D panels, panels * 32, 64).
    """
    size = q.shape[2]
    key_heads = k.shape[1]
    group = q.shape[1] // key_heads
    widest = prompt_keys.shape[1] + -(-most // PANEL)
    own_keys = np.empty((widest, size // 2, PANEL), np.uint32)
    own_values = np.zeros((prompt_values.shape[1], widest * PANEL // 2, PANEL), np.uint32)
    rows = np.zeros((ROWS, size), np.uint16)
    scores = np.empty((ROWS, widest * PANEL), np.float32)
    probs = np.zeros((ROWS, widest * PANEL), np.uint16)
    sums = np.empty((ROWS, own_values.shape[0] * PANEL), np.float32)
    for task in range(start, stop):
        segment, head = divmod(task, key_heads)
        first, count, first_key, sees = table[segment]
        seen = prompt_len if sees else 0
        base = -(-seen // PANEL) * PANEL
        pack_columns(k, first_key, count, head, own_keys)
        pack_rows(v, first_key, count, head, own_values)
        for query_head in range(head * group, (head + 1) * group):
            for top in range(0, count, ROWS):
                height = min(ROWS, count - top)
                _copy_rows(q, first + top, height, query_head, rows)
                panels = -(-(top + height) // PANEL)
                products(rows, prompt_keys[head], base // PANEL, own_keys, panels, scores)
                width = base + panels * PANEL
                for r in range(height):
                    row = scores[r, :width]
                    total, log_sum = softmax(row, seen, base, top + r + 1, scale, probs[r, :width])
                    lse[first + top + r, query_head] = log_sum
                    scores[r, 0] = np.float32(1) / total
                for part in range(sums.shape[1] // PANEL):
                    left, place = probs.ctypes.data, sums.ctypes.data + 4 * part * PANEL
                    step, out_step = probs.strides[0], sums.strides[0]
                    if base:
                        right = prompt_values[head, part]
                        square_tile(left, step, 4, right, base // 2, place, out_step, False)
                    square_tile(
                        left + 2 * base, step, 4, own_values[part], panels * 32, place, out_step,
                        base > 0,
                    )  # fmt: skip
                for r in range(height):
                    store_row(out[first + top + r, query_head], sums[r], scores[r, 0])


@njit(nogil=True, cache=True)
def backward(
    start, stop, q, k, v, table, prompt_len, prompt_keys, prompt_values, prompt_key_pairs, scale,
    most, out, lse, d_out, slots, d_q, d_k, d_v, d_prompt,
):  # fmt: skip
    """Tasks [start, stop): d_q of their rows, d_k and d_v of their own keys.

    What they add to keys and values of the prompt goes to d_prompt[slots[start]] (Hkv, 2, prompt,
    D) fp32, which is zero before; the prompt's own share goes to d_prompt[-1]. prompt_values holds
    values packed as columns, prompt_key_pairs keys packed as pairs of rows.
    """
    size = q.shape[2]
    key_heads = k.shape[1]
    group = q.shape[1] // key_heads
    parts = prompt_key_pairs.shape[1]
    widest = prompt_keys.shape[1] + -(-most // PANEL)
    own_keys = np.empty((widest, size // 2, PANEL), np.uint32)
    own_values = np.empty((widest, size // 2, PANEL), np.uint32)
    own_key_pairs = np.zeros((parts, widest * PANEL // 2, PANEL), np.uint32)
    rows = np.zeros((ROWS, size), np.uint16)
    upstream = np.zeros((ROWS, size), np.uint16)
    scores = np.empty((ROWS, widest * PANEL), np.float32)
    slopes = np.empty((ROWS, widest * PANEL), np.float32)
    probs = np.zeros((CHUNK, widest * PANEL + LANES), np.uint16)
    d_scores = np.zeros((CHUNK, widest * PANEL + LANES), np.uint16)
    turned = np.zeros((CHUNK // 2, widest * PANEL + LANES), np.uint32)
    packed = np.zeros((parts, PANEL * -(-CHUNK // PANEL) // 2, PANEL), np.uint32)
    sums = np.empty((ROWS, parts * PANEL), np.float32)
    d_keys = np.empty((2, widest * PANEL + ROWS, parts * PANEL), np.float32)
    for task in range(start, stop):
        segment, head = divmod(task, key_heads)
        first, count, first_key, sees = table[segment]
        seen = prompt_len if sees else 0
        base = -(-seen // PANEL) * PANEL
        pack_columns(k, first_key, count, head, own_keys)
        pack_columns(v, first_key, count, head, own_values)
        pack_rows(k, first_key, count, head, own_key_pairs)
        for row in range(base + -(-count // PANEL) * PANEL + ROWS):
            _zero(d_keys[0, row])
            _zero(d_keys[1, row])
        for query_head in range(head * group, (head + 1) * group):
            for begin in range(0, count, CHUNK):
                end = min(begin + CHUNK, count)
                chunk_width = base + -(-end // PANEL) * PANEL
                for top in range(begin, end, ROWS):
                    height = min(ROWS, end - top)
                    _copy_rows(q, first + top, height, query_head, rows)
                    _copy_rows(d_out, first + top, height, query_head, upstream)
                    panels = -(-(top + height) // PANEL)
                    products(rows, prompt_keys[head], base // PANEL, own_keys, panels, scores)
                    products(
                        upstream, prompt_values[head], base // PANEL, own_values, panels, slopes
                    )
                    width = base + panels * PANEL
                    for r in range(height):
                        i = first + top + r
                        delta = _dot(d_out[i, query_head], out[i, query_head])
                        at = top - begin + r
                        _score_slopes(
                            scores[r, :width], slopes[r, :width], seen, base, top + r + 1, scale,
                            lse[i, query_head], delta, probs[at, :chunk_width],
                            d_scores[at, :chunk_width],
                        )  # fmt: skip
                    for part in range(parts):
                        left = d_scores[top - begin].ctypes.data
                        place = sums.ctypes.data + 4 * part * PANEL
                        step, out_step = d_scores.strides[0], sums.strides[0]
                        if base:
                            right = prompt_key_pairs[head, part]
                            square_tile(left, step, 4, right, base // 2, place, out_step, False)
                        square_tile(
                            left + 2 * base, step, 4, own_key_pairs[part], panels * 32, place,
                            out_step, base > 0,
                        )  # fmt: skip
                    for r in range(height):
                        store_row(d_q[first + top + r, query_head], sums[r], np.float32(1))
                if (end - begin) % 2:
                    _zero(probs[end - begin, :chunk_width])
                    _zero(d_scores[end - begin, :chunk_width])
                pairs = -(-(end - begin) // 2)
                pack_rows(q, first + begin, end - begin, query_head, packed)
                _add_transposed(d_scores, chunk_width, pairs, packed, turned, d_keys[0])
                pack_rows(d_out, first + begin, end - begin, query_head, packed)
                _add_transposed(probs, chunk_width, pairs, packed, turned, d_keys[1])
        for which in range(2):
            if sees:
                into = d_prompt[slots[start], head, which]
                for row in range(seen):
                    for d in range(size):
                        into[row, d] += d_keys[which, row, d]
            target = d_k if which == 0 else d_v
            for row in range(count):
                if first_key + row < prompt_len:
                    copy_row(d_keys[which, base + row], d_prompt[-1, head, which, row])
                else:
                    store_row(
                        target[first_key + row, head], d_keys[which, base + row], np.float32(1)
                    )


@njit(inline="always")
def _address(rows, row, head):
    return rows.ctypes.data + row * rows.strides[0] + head * rows.strides[1]


@njit(nogil=True, cache=True)
def _copy_rows(source, first, count, head, out):
    for r in range(count):
        copy_row(source[first + r, head], out[r])


@njit(nogil=True, cache=True)
def products(rows, prompt, prompt_panels, own, own_panels, out):
    """out (6, keys) fp32 = rows (6, D) times the columns of the prompt's panels and of its own."""
    left, step, words = rows.ctypes.data, rows.strides[0], own.shape[1]
    place, out_step = out.ctypes.data, out.strides[0]
    for panel in range(prompt_panels):
        square_tile(left, step, 4, prompt[panel], words, place, out_step, False)
        place += 4 * PANEL
    for panel in range(own_panels):
        square_tile(left, step, 4, own[panel], words, place, out_step, False)
        place += 4 * PANEL


@njit(nogil=True, cache=True)
def _add_transposed(matrix, width, pairs, packed, turned, out):
    """out (width, D) fp32 += matrix (2 pairs, width).T @ the packed rows."""
    for pair in range(pairs):
        low, high = matrix[2 * pair].ctypes.data, matrix[2 * pair + 1].ctypes.data
        for column in range(0, width, LANES):
            place = turned[pair].ctypes.data + 4 * column
            zip_words(low + 2 * column, high + 2 * column, place)
        _zero(turned[pair, width : width + LANES])
    for part in range(packed.shape[0]):
        right = packed[part]
        for top in range(0, width, ROWS):
            left = turned.ctypes.data + 4 * top
            place = out[top].ctypes.data + 4 * part * PANEL
            square_tile(left, 4, turned.strides[0], right, pairs, place, out.strides[0], True)


@njit(nogil=True, cache=True)
def _zero(row):
    for j in range(row.size):
        row[j] = 0


@njit(nogil=True, cache=True)
def softmax(row, seen, base, own, scale, out):
    """Sum of the exponentials of a row and its log-sum-exp; their bf16 go to `out`, 0 where there
    is no key: keys [0, seen) and [base, base + own) exist."""
    top = max(_largest(row[:seen]), _largest(row[base : base + own])) * scale
    total = _exponentials(row[:seen], scale, top, out[:seen])
    _zero(out[seen:base])
    total += _exponentials(row[base : base + own], scale, top, out[base : base + own])
    _zero(out[base + own :])
    return total, top + np.float32(math.log(total))


@njit(nogil=True, cache=True, fastmath=_FAST)
def _largest(row):
    top = np.float32(-np.inf)
    for i in range(row.size):
        top = maximum(top, row[i])
    return top


@njit(nogil=True, cache=True, fastmath=_FAST)
def _exponentials(row, scale, top, out):
    total = np.float32(0)
    for i in range(row.size):
        e = exp(row[i] * scale - top)
        total += e
        put(out, i, e)
    return total


@njit(nogil=True, cache=True)
def _score_slopes(scores, slopes, seen, base, own, scale, log_sum, delta, probs, d_scores):
    """bf16 probabilities of a row and the gradient of its scores, 0 where there is no key."""
    _slopes(scores[:seen], slopes[:seen], scale, log_sum, delta, probs[:seen], d_scores[:seen])
    _zero(probs[seen:base])
    _zero(d_scores[seen:base])
    last = base + own
    _slopes(
        scores[base:last], slopes[base:last], scale, log_sum, delta, probs[base:last],
        d_scores[base:last],
    )  # fmt: skip
    _zero(probs[last:])
    _zero(d_scores[last:])


@njit(nogil=True, cache=True)
def _slopes(scores, slopes, scale, log_sum, delta, probs, d_scores):
    for i in range(scores.size):
        p = exp(scores[i] * scale - log_sum)
        put(probs, i, p)
        put(d_scores, i, p * (slopes[i] - delta) * scale)


@njit(nogil=True, cache=True, fastmath=_FAST)
def _dot(left, right):
    total = np.float32(0)
    for d in range(left.size):
        total += value(left[d]) * value(right[d])
    return total


@njit(nogil=True, cache=True)
def store_row(out, values, factor):
    for d in range(out.size):
        put(out, d, values[d] * factor)
