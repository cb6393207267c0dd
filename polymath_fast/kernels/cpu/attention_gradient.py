"""Attention over a shared prompt in tiles: backward of one segment under one key head a task.

Probabilities and gradients of scores of `CHUNK` query rows are held before they are multiplied into
the gradients of keys and values. The steps of a task are inlined: to hand over their arrays would
take as long as the arithmetic of a short segment.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from polymath_fast.kernels.cpu import blocks
from polymath_fast.kernels.cpu.attention import gather
from polymath_fast.kernels.cpu.attention_parts import (
    add_transposed,
    copy_rows,
    pack_columns,
    pack_rows,
    products,
    store_row,
    weighted_sums,
    whole_panels,
    zero,
)
from polymath_fast.kernels.cpu.jit import BORROWED, INLINED, njit
from polymath_fast.kernels.cpu.layers import copy_row
from polymath_fast.kernels.cpu.panel_blocks import PANEL, rows_of
from polymath_fast.kernels.cpu.scalar import exp, put, value
from polymath_fast.kernels.cpu.tiles import LANES

CHUNK = 96
_FAST = {"reassoc", "nsz", "contract", "arcp"}


class _Keys(NamedTuple):
    """What queries of one head see, packed for products."""

    columns: np.ndarray
    """keys as columns"""
    values: np.ndarray
    """values as columns"""
    rows: np.ndarray
    """keys as rows"""


class _Tile(NamedTuple):
    """Scratch for the queries of a block."""

    queries: np.ndarray
    upstream: np.ndarray
    scores: np.ndarray
    slopes: np.ndarray
    """gradients of the probabilities"""
    sums: np.ndarray


class _Chunk(NamedTuple):
    """What is kept of `CHUNK` queries, and scratch for its products."""

    probs: np.ndarray
    d_scores: np.ndarray
    turned: np.ndarray
    rows: np.ndarray
    packed: np.ndarray


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
    parts, block = prompt_key_rows.shape[1], rows_of(prompt_keys)
    width = (prompt_keys.shape[1] + -(-most // PANEL)) * PANEL
    path = np.empty((most, k.shape[2]), k.dtype)
    own = _room_for_keys(most, k, prompt_keys, parts)
    tile = _room_for_tile(block, q, width, parts)
    chunk = _room_for_chunk(q, width, prompt_keys, parts)
    d_keys = np.empty((width + block, parts * PANEL), np.float32)
    d_values = np.empty(d_keys.shape, np.float32)
    prompt = _Keys(prompt_keys, prompt_values, prompt_key_rows)
    before = np.empty(blocks.SAVED, np.uint8)
    _backward(
        start, stop, q, k, v, table, runs, prompt_len, prompt, scale, out, lse, d_out,
        d_shared[slots[start]], d_shared[-1], d_q, d_k, d_v, path, own, tile, chunk, d_keys,
        d_values, before,
    )  # fmt: skip


@njit(**BORROWED)
def _backward(
    start, stop, q, k, v, table, runs, prompt_len, prompts, scale, out, lse, d_out, shared, inner,
    d_q, d_k, d_v, path, own, tile, chunk, d_keys, d_values, before,
):  # fmt: skip
    """`backward` with room for everything; `prompts` holds those of all heads."""
    blocks.begin(own.columns, before)
    key_heads = k.shape[1]
    group = q.shape[1] // key_heads
    for task in range(start, stop):
        segment, head = divmod(task, key_heads)
        line = table[segment]
        first, count, _, sees = line[:4]
        seen = prompt_len if sees else 0
        prompt = _Keys(prompts.columns[head], prompts.values[head], prompts.rows[head])
        above = _pack(k, v, line, runs, head, path, own)
        used = whole_panels(seen) + whole_panels(above + count) + rows_of(own.columns)
        for row in range(used):
            zero(d_keys[row])
            zero(d_values[row])
        for query_head in range(head * group, (head + 1) * group):
            for begin in range(0, count, CHUNK):
                which = (first + begin, min(CHUNK, count - begin), query_head)
                ahead = above + begin
                _to_queries(
                    q, d_out, out, lse, which, seen, ahead, prompt, own, scale, tile, chunk, d_q
                )
                _to_keys(chunk.d_scores, q, which, seen, ahead, chunk, d_keys)
                _to_keys(chunk.probs, d_out, which, seen, ahead, chunk, d_values)
        _hand_out(d_keys, seen, line, runs, head, shared[head, 0], inner[head, 0], d_k)
        _hand_out(d_values, seen, line, runs, head, shared[head, 1], inner[head, 1], d_v)
    blocks.end(own.columns, before)


def _room_for_keys(most, k, like, parts):
    panels = -(-most // PANEL)
    columns = np.empty((panels, like.shape[2], PANEL), like.dtype)
    rows = np.zeros((parts, panels * PANEL * k.itemsize // 4, PANEL), like.dtype)
    return _Keys(columns, np.empty(columns.shape, like.dtype), rows)


def _room_for_tile(block, q, width, parts):
    rows, scores = (block, q.shape[2]), (block, width)
    return _Tile(
        np.zeros(rows, q.dtype), np.zeros(rows, q.dtype), np.empty(scores, np.float32),
        np.empty(scores, np.float32), np.empty((block, parts * PANEL), np.float32),
    )  # fmt: skip


def _room_for_chunk(q, width, like, parts):
    pairs = CHUNK // 2 if q.itemsize == 2 else 0
    depth = whole_panels(CHUNK) * q.itemsize // 4
    return _Chunk(
        np.zeros((CHUNK, width + LANES), q.dtype), np.zeros((CHUNK, width + LANES), q.dtype),
        np.zeros((pairs, width + LANES), np.uint32), np.empty((CHUNK, q.shape[2]), q.dtype),
        np.zeros((parts, depth, PANEL), like.dtype),
    )  # fmt: skip


@njit(**INLINED)
def _pack(k, v, line, runs, head, path, own):
    """Keys and values of a segment's path into `own`; how many are above the segment."""
    above = gather(k, line, runs, head, path)
    count = above + line[1]
    pack_columns(path, count, own.columns)
    pack_rows(path, count, own.rows)
    gather(v, line, runs, head, path)
    pack_columns(path, count, own.values)
    return above


@njit(**INLINED)
def _to_queries(q, d_out, out, lse, which, seen, before, prompt, own, scale, tile, chunk, d_q):
    """d_q of a chunk of queries, and probabilities and gradients of scores into `chunk`.

    which: their first row, their number, their head. They see the first `seen` keys of the prompt
    and of their own the `before` that are above the first of them, then each its own.
    """
    first, count, head = which
    base = whole_panels(seen)
    width = base + whole_panels(before + count) + LANES
    scores, slopes, sums = tile.scores, tile.slopes, tile.sums
    probs, d_scores = chunk.probs, chunk.d_scores
    block = rows_of(own.columns)
    for top in range(0, count, block):
        height = min(block, count - top)
        copy_rows(q, first + top, height, head, tile.queries, 0)
        copy_rows(d_out, first + top, height, head, tile.upstream, 0)
        last = before + top + height
        products(tile.queries, seen, prompt.columns, last, own.columns, scores)
        products(tile.upstream, seen, prompt.values, last, own.values, slopes)
        used = base + whole_panels(last)
        for r in range(height):
            i, at = first + top + r, top + r
            delta = _dot(d_out[i, head], out[i, head])
            _score_slopes(
                scores[r, :used], slopes[r, :used], seen, base, before + at + 1, scale,
                lse[i, head], delta, probs[at, :width], d_scores[at, :width],
            )  # fmt: skip
        weighted_sums(d_scores[top:], seen, prompt.rows, last, own.rows, sums)
        for r in range(height):
            store_row(d_q[first + top + r, head], sums[r], np.float32(1))


@njit(**INLINED)
def _to_keys(matrix, source, which, seen, before, chunk, out):
    """out (keys, D) += matrix (queries, keys).T @ the chunk's rows of `source`."""
    first, count, head = which
    width = whole_panels(seen) + whole_panels(before + count)
    copy_rows(source, first, count, head, chunk.rows, 0)
    pack_rows(chunk.rows, count, chunk.packed)
    add_transposed(matrix, count, seen, width, before, chunk.packed, chunk.turned, out)


@njit(**INLINED)
def _hand_out(sums, seen, line, runs, head, shared, inner, out):
    """Gradients (keys, D) of a path: of rows that others see, too, added to `shared`, the segment's
    own into `inner` where it has children, else into `out` (T, Hkv, D)."""
    _add_rows(sums, seen, shared)
    at = whole_panels(seen)
    for run in range(line[4], line[5]):
        _add_rows(sums[at:], runs[run, 1], shared[runs[run, 2] :])
        at += runs[run, 1]
    _, count, first, _, _, _, place = line
    for row in range(count):
        if place >= 0:
            copy_row(sums[at + row], inner[place + row])
        else:
            store_row(out[first + row, head], sums[at + row], np.float32(1))


@njit(**BORROWED)
def _add_rows(rows, count, out):
    for row in range(count):
        for d in range(out.shape[1]):
            out[row, d] += rows[row, d]


@njit(**BORROWED)
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


@njit(**BORROWED)
def _slopes(scores, slopes, scale, log_sum, delta, probs, d_scores):
    for i in range(scores.size):
        p = exp(scores[i] * scale - log_sum)
        put(probs, i, p)
        put(d_scores, i, p * (slopes[i] - delta) * scale)


@njit(fastmath=_FAST, **INLINED)
def _dot(left, right):
    total = np.float32(0)
    for d in range(left.size):
        total += value(left[d]) * value(right[d])
    return total
