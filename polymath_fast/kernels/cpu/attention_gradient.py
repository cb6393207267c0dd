"""Attention over a shared prompt in tiles: backward of one segment under one key head a task.

Scores are computed as keys x queries: so probabilities and gradients of scores are left factors of
the gradients of values and keys as they are, and the latter, in pairs of keys, the right factor of
the gradient of queries. The queries of a task, all of its key head, are columns, row by row: those
that see a key are the last ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from polymath_fast.kernels.cpu import blocks
from polymath_fast.kernels.cpu.attention import gather
from polymath_fast.kernels.cpu.attention_keys import Keys, complete, room_for_keys
from polymath_fast.kernels.cpu.attention_parts import store_row, whole_panels, zero
from polymath_fast.kernels.cpu.attention_queries import (
    COLUMNS,
    PAIR,
    load,
    room_for_queries,
    store,
)
from polymath_fast.kernels.cpu.attention_vectors import pair_slopes
from polymath_fast.kernels.cpu.jit import BORROWED, INLINED, njit
from polymath_fast.kernels.cpu.layers import copy_row
from polymath_fast.kernels.cpu.panel_blocks import PANEL, multiply_lanes
from polymath_fast.kernels.cpu.scalar import LOG2_E
from polymath_fast.kernels.cpu.tiles import LANES

_NOBODY = np.int32(1 << 30)


class _Scores(NamedTuple):
    """Scratch for a panel of keys."""

    scores: np.ndarray
    slopes: np.ndarray
    """gradients of the probabilities; both for 16 keys and a panel of queries"""
    probs: np.ndarray
    """(64, columns)"""
    d_scores: np.ndarray
    panel: np.ndarray
    """the same of a panel of queries, packed"""


def backward(
    start, stop, q, k, v, table, runs, prompt_len, prompts, scale, most, out, lse, d_out, slots,
    d_q, d_k, d_v, d_shared,
):  # fmt: skip
    """Tasks [start, stop): d_q of their rows, d_k and d_v of those of their keys that they share
    with nobody.

    Keys that others see, too, are counted in shared rows: the prompt's, then those of `runs`. What
    tasks add to them goes to d_shared[slots[start]] (Hkv, 2, shared rows, D) fp32, which is zero
    before; what a segment's own queries give to its own rows to d_shared[-1]. There D is filled up
    to whole panels, and `LANES` rows follow, which stay 0. prompts: `Keys` of all heads; the rest
    is that of `forward`.
    """
    size, group = k.shape[2], q.shape[1] // k.shape[1]
    own = room_for_keys(most, size, k.dtype)
    queries = room_for_queries(group, size, q.dtype)
    room = _room_for_scores(queries, q.dtype)
    sums = np.empty((len(own.rows), queries.packed.shape[0] * PANEL), np.float32)
    before = np.empty(blocks.SAVED, np.uint8)
    _backward(
        start, stop, q, k, v, table, runs, prompt_len, prompts, scale, out, lse, d_out,
        d_shared[slots[start]], d_shared[-1], d_q, d_k, d_v, own, queries, room, sums,
        np.empty_like(sums), before,
    )  # fmt: skip


def _room_for_scores(queries, dtype):
    block, wide = (LANES, PANEL), (PANEL, len(queries.log_sums))
    panel = (PANEL * dtype.itemsize // 4, PANEL)
    return _Scores(
        np.empty(block, np.float32), np.empty(block, np.float32), np.empty(wide, dtype),
        np.empty(wide, dtype), np.empty(panel, queries.columns.dtype),
    )  # fmt: skip


@njit(**BORROWED)
def _backward(
    start, stop, q, k, v, table, runs, prompt_len, prompts, scale, out, lse, d_out, shared, inner,
    d_q, d_k, d_v, own, queries, room, d_keys, d_values, before,
):  # fmt: skip
    """`backward` with room for everything."""
    blocks.begin(queries.columns, before)
    key_heads = k.shape[1]
    group = q.shape[1] // key_heads
    at_once = max(1, COLUMNS // group)
    for task in range(start, stop):
        segment, head = divmod(task, key_heads)
        line = table[segment]
        first, count, _, sees = line[:4]
        prompt = Keys(prompts.rows[head], prompts.turned[head], prompts.values[head])
        above = gather(k, line, runs, head, own.rows)
        gather(v, line, runs, head, own.values)
        complete(own.rows, own.turned, own.values, above + count)
        for row in range(whole_panels(above + count)):
            zero(d_keys[row])
            zero(d_values[row])
        for begin in range(0, count, at_once):
            rows = min(at_once, count - begin)
            ahead, which = above + begin, (first + begin, rows, head * group, group)
            columns = load(q, out, lse, d_out, which, scale, queries)
            if sees:
                _meet(
                    prompt, (prompt_len, prompt_len, group), columns, scale, queries, room,
                    shared[head, 0], shared[head, 1],
                )  # fmt: skip
            seen = ahead + rows, ahead, group
            _meet(own, seen, columns, scale, queries, room, d_keys, d_values)
            store(queries, which, d_q)
        _hand_out(d_keys, line, runs, head, shared[head, 0], inner[head, 0], d_k)
        _hand_out(d_values, line, runs, head, shared[head, 1], inner[head, 1], d_v)
    blocks.end(queries.columns, before)


@njit(**BORROWED)
def _meet(keys, seen, columns, scale, queries, room, d_keys, d_values):
    """What keys give to the sums of a chunk of queries, and the chunk to theirs.

    seen: how many keys there are; of the chunk's rows the first sees so many of them and one more,
    if there are as many, and each further row one more; and how many queries are a row.
    """
    count, ahead, group = seen
    per_word = 4 // room.probs.itemsize
    for top in range(0, count, PANEL):
        height = min(PANEL, -(-(count - top) // PAIR) * PAIR)
        for panel in range(_first_panel(top - ahead, group), -(-columns // PANEL)):
            width = min(PANEL, columns - panel * PANEL)
            _score(keys, top, height, seen, panel, width, scale, queries, room)
            for d in range(0, queries.sums.shape[1], LANES):
                left, place = keys.turned[top // PANEL, d], queries.sums[panel, d]
                multiply_lanes(
                    left.ctypes.data, left.nbytes, room.panel, height // per_word,
                    place.ctypes.data, 4 * PANEL, width, True,
                )  # fmt: skip
        for row in range(0, min(height, count - top), LANES):
            begin = _first_panel(top + row - ahead, group) * PANEL
            if begin < columns:
                words, at = (columns - begin) // per_word, begin // per_word
                left = room.d_scores[row, begin:]
                _add(left, room.probs.strides[0], queries.packed, at, words, d_keys[top + row])
                left = room.probs[row, begin:]
                _add(
                    left, room.probs.strides[0], queries.packed_upstream, at, words,
                    d_values[top + row],
                )  # fmt: skip


@njit(**INLINED)
def _add(left, step, packed, first, words, out):
    """16 rows from `out` on += as many from `left` on times packed rows from a word on."""
    for part in range(packed.shape[0]):
        place = out[part * PANEL :].ctypes.data
        multiply_lanes(
            left.ctypes.data, step, packed[part, first:], words, place, out.nbytes, PANEL, True
        )


@njit(**INLINED)
def _first_panel(key, group):
    """Of queries, the first one that has some that see a key, which is so many behind what the
    first row sees for sure."""
    return max(0, key) * group // PANEL


@njit(**BORROWED)
def _score(keys, top, height, seen, panel, width, scale, queries, room):
    """Probabilities and gradients of scores of keys [top, top + height) under the first `width`
    queries of a panel."""
    _, ahead, group = seen
    columns, upstream = queries.columns[panel], queries.upstream[panel]
    log_sums = queries.log_sums[panel * PANEL :].ctypes.data
    deltas = queries.deltas[panel * PANEL :].ctypes.data
    words, line = columns.shape[0], 4 * PANEL
    scores, slopes = room.scores.ctypes.data, room.slopes.ctypes.data
    factor = scale * np.float32(LOG2_E)
    for row in range(0, height, LANES):
        if (top + row - ahead) * group < panel * PANEL + width:  # else nobody sees them
            left, step = keys.rows[top + row].ctypes.data, keys.rows.strides[0]
            multiply_lanes(left, step, columns, words, scores, line, width, False)
            left = keys.values[top + row].ctypes.data
            multiply_lanes(left, step, upstream, words, slopes, line, width, False)
        for key in range(row, row + LANES, 2):
            firsts = _first(top + key, seen, panel), _first(top + key + 1, seen, panel)
            offset = (key - row) * line
            pair_slopes(
                scores + offset, slopes + offset, log_sums, deltas, width // LANES, firsts, factor,
                scale, room.probs[key, panel * PANEL :], room.probs.strides[0],
                room.d_scores[key, panel * PANEL :].ctypes.data,
                room.panel[key * room.probs.itemsize // 4].ctypes.data,
            )  # fmt: skip


@njit(**INLINED)
def _first(key, seen, panel):
    """The first query of a panel that sees a key; see `_meet`."""
    count, ahead, group = seen
    if key >= count:
        return _NOBODY
    return np.int32((key - ahead) * group - panel * PANEL)


@njit(**INLINED)
def _hand_out(sums, line, runs, head, shared, inner, out):
    """Gradients (keys, D) of a path: of rows that others see, too, added to `shared`, the segment's
    own into `inner` where it has children, else into `out` (T, Hkv, D)."""
    at = 0
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
