"""Attention over a shared prompt in tiles: backward of one segment under one key head a task.

Probabilities and gradients of scores of `CHUNK` query rows are held before they are multiplied into
the gradients of keys and values.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from polymath_fast.kernels.cpu.attention import gather
from polymath_fast.kernels.cpu.attention_parts import (
    PANEL,
    ROWS,
    copy_rows,
    pack_columns,
    pack_rows,
    products,
    store_row,
    weighted_sums,
    zero,
)
from polymath_fast.kernels.cpu.layers import copy_row
from polymath_fast.kernels.cpu.moves import zip_words
from polymath_fast.kernels.cpu.scalar import exp, put, value
from polymath_fast.kernels.cpu.tiles import LANES, square_tile

CHUNK = 96
_FAST = {"reassoc", "nsz", "contract", "arcp"}


@njit(nogil=True, cache=True)
def backward(
    start, stop, q, k, v, table, runs, prompt_len, prompt_keys, prompt_values, prompt_key_rows,
    scale, most, out, lse, d_out, slots, d_q, d_k, d_v, d_shared,
):  # fmt: skip
    """Tasks [start, stop): d_q of their rows, d_k and d_v of those of their keys that they share
    with nobody.

    Keys that others see, too, are counted in shared rows: the prompt's, then those of `runs`. What
    tasks add to them goes to d_shared[slots[start]] (Hkv, 2, shared rows, D) fp32, which is zero
    before; what a segment's own queries give to its own rows to d_shared[-1]. prompt_values holds
    values packed as columns, prompt_key_rows keys packed as rows; the rest is that of `forward`.
    """
    size, key_heads = q.shape[2], k.shape[1]
    group = q.shape[1] // key_heads
    parts = prompt_key_rows.shape[1]
    own_panels = -(-most // PANEL)
    keys = np.empty((own_panels, prompt_keys.shape[2], PANEL), prompt_keys.dtype)
    values = np.empty(keys.shape, keys.dtype)
    depth = own_panels * PANEL * k.itemsize // 4
    key_rows = np.zeros((parts, depth, PANEL), keys.dtype)
    path = np.empty((most, size), k.dtype)
    width = (prompt_keys.shape[1] + own_panels) * PANEL
    rows = np.zeros((ROWS, size), q.dtype)
    upstream = np.zeros((ROWS, size), q.dtype)
    scores = np.empty((ROWS, width), np.float32)
    slopes = np.empty((ROWS, width), np.float32)
    probs = np.zeros((CHUNK, width + LANES), q.dtype)
    d_scores = np.zeros((CHUNK, width + LANES), q.dtype)
    turned = np.zeros((CHUNK // 2 if q.itemsize == 2 else 0, width + LANES), np.uint32)
    chunk = np.empty((CHUNK, size), q.dtype)
    packed_chunk = -(-CHUNK // PANEL) * PANEL * q.itemsize // 4
    packed = np.zeros((parts, packed_chunk, PANEL), keys.dtype)
    sums = np.empty((ROWS, parts * PANEL), np.float32)
    d_keys = np.empty((2, width + ROWS, parts * PANEL), np.float32)
    for task in range(start, stop):
        segment, head = divmod(task, key_heads)
        first, count, _, sees = table[segment, :4]
        seen = prompt_len if sees else 0
        base = -(-seen // PANEL) * PANEL
        above = gather(k, table[segment], runs, head, path)
        pack_columns(path, above + count, keys)
        pack_rows(path, above + count, key_rows)
        gather(v, table[segment], runs, head, path)
        pack_columns(path, above + count, values)
        for row in range(base + -(-(above + count) // PANEL) * PANEL + ROWS):
            zero(d_keys[0, row])
            zero(d_keys[1, row])
        for query_head in range(head * group, (head + 1) * group):
            for begin in range(0, count, CHUNK):
                end = min(begin + CHUNK, count)
                chunk_width = base + -(-(above + end) // PANEL) * PANEL
                for top in range(begin, end, ROWS):
                    height = min(ROWS, end - top)
                    copy_rows(q, first + top, height, query_head, rows, 0)
                    copy_rows(d_out, first + top, height, query_head, upstream, 0)
                    last = above + top + height
                    products(rows, seen, prompt_keys[head], last, keys, scores)
                    products(upstream, seen, prompt_values[head], last, values, slopes)
                    used = base + -(-last // PANEL) * PANEL
                    for r in range(height):
                        i, at = first + top + r, top - begin + r
                        delta = _dot(d_out[i, query_head], out[i, query_head])
                        _score_slopes(
                            scores[r, :used], slopes[r, :used], seen, base, above + top + r + 1,
                            scale, lse[i, query_head], delta, probs[at, : chunk_width + LANES],
                            d_scores[at, : chunk_width + LANES],
                        )  # fmt: skip
                    some = d_scores[top - begin :]
                    weighted_sums(some, seen, prompt_key_rows[head], last, key_rows, sums)
                    for r in range(height):
                        store_row(d_q[first + top + r, query_head], sums[r], np.float32(1))
                high = end - begin
                copy_rows(q, first + begin, high, query_head, chunk, 0)
                pack_rows(chunk, high, packed)
                _add_transposed(
                    d_scores, high, seen, chunk_width, above + begin, packed, turned, d_keys[0]
                )
                copy_rows(d_out, first + begin, high, query_head, chunk, 0)
                pack_rows(chunk, high, packed)
                _add_transposed(
                    probs, high, seen, chunk_width, above + begin, packed, turned, d_keys[1]
                )
        for which in range(2):
            shared = d_shared[slots[start], head, which]
            _add_rows(d_keys[which], seen, shared)
            at = base
            for run in range(table[segment, 4], table[segment, 5]):
                _add_rows(d_keys[which, at:], runs[run, 1], shared[runs[run, 2] :])
                at += runs[run, 1]
            _, _, first_key, _, _, _, place = table[segment]
            for row in range(count):
                if place >= 0:
                    copy_row(d_keys[which, at + row], d_shared[-1, head, which, place + row])
                else:
                    target = d_k if which == 0 else d_v
                    store_row(target[first_key + row, head], d_keys[which, at + row], np.float32(1))


@njit(nogil=True, cache=True)
def _add_rows(rows, count, out):
    for row in range(count):
        for d in range(out.shape[1]):
            out[row, d] += rows[row, d]


@njit(nogil=True, cache=True)
def _score_slopes(scores, slopes, seen, base, own, scale, log_sum, delta, probs, d_scores):
    """Probabilities of a row and the gradient of its scores, 0 where there is no key."""
    _slopes(scores[:seen], slopes[:seen], scale, log_sum, delta, probs[:seen], d_scores[:seen])
    zero(probs[seen:base])
    zero(d_scores[seen:base])
    last = base + own
    _slopes(
        scores[base:last], slopes[base:last], scale, log_sum, delta, probs[base:last],
        d_scores[base:last],
    )  # fmt: skip
    zero(probs[last:])
    zero(d_scores[last:])


@njit(nogil=True, cache=True)
def _slopes(scores, slopes, scale, log_sum, delta, probs, d_scores):
    for i in range(scores.size):
        p = exp(scores[i] * scale - log_sum)
        put(probs, i, p)
        put(d_scores, i, p * (slopes[i] - delta) * scale)


@njit(nogil=True, cache=True, fastmath=_FAST, forceinline=True)
def _dot(left, right):
    total = np.float32(0)
    for d in range(left.size):
        total += value(left[d]) * value(right[d])
    return total


def _add_transposed(matrix, count, seen, width, own, packed, turned, out):
    """out (width, D) fp32 += matrix (count, width).T @ `count` packed rows.

    Row i is 0 but for `seen` columns and, from the next whole panel on, own + i + 1. `turned` is
    scratch for bf16: its rows in pairs.
    """
    raise NotImplementedError("compiled code only")


@overload(_add_transposed, jit_options={"nogil": True, "cache": True})
def _compiled_add_transposed(matrix, count, seen, width, own, packed, turned, out):
    if matrix.dtype == types.uint16:

        def add(matrix, count, seen, width, own, packed, turned, out):
            if count % 2:
                zero(matrix[count, : width + LANES])
            pairs = -(-count // 2)
            for pair in range(pairs):
                low, high = matrix[2 * pair].ctypes.data, matrix[2 * pair + 1].ctypes.data
                for column in range(0, width + LANES, LANES):
                    place = turned[pair].ctypes.data + 4 * column
                    zip_words(low + 2 * column, high + 2 * column, place)
            _add_products(turned, pairs, 2, count, seen, own, packed, out)
    else:

        def add(matrix, count, seen, width, own, packed, turned, out):
            _add_products(matrix, count, 1, count, seen, own, packed, out)

    return add


@njit(nogil=True, cache=True)
def _add_products(words, depth, per_word, count, seen, own, packed, out):
    """The products of `_add_transposed`; words (depth, .) hold `per_word` of its rows each."""
    base = -(-seen // PANEL) * PANEL
    for part in range(packed.shape[0]):
        top = 0
        while top < base + own + count:
            if seen <= top < base:
                top = base
            first = max(0, top - base - own) // per_word  # the first row that sees these keys
            left = words.ctypes.data + 4 * top + first * words.strides[0]
            place = out[top].ctypes.data + 4 * part * PANEL
            right = packed[part, first:]
            square_tile(
                left, 4, words.strides[0], right, depth - first, place, out.strides[0], True
            )
            top += ROWS
