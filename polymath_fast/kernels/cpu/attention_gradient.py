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
from polymath_fast.kernels.cpu.attention_parts import (
    copy_rows,
    pack_columns,
    pack_rows,
    store_row,
    turn_block,
    whole_panels,
    zero,
)
from polymath_fast.kernels.cpu.attention_vectors import pair_slopes
from polymath_fast.kernels.cpu.jit import BORROWED, INLINED, njit
from polymath_fast.kernels.cpu.layers import copy_row
from polymath_fast.kernels.cpu.moves import turn_words
from polymath_fast.kernels.cpu.panel_blocks import PANEL, multiply_lanes
from polymath_fast.kernels.cpu.scalar import LOG2_E, value
from polymath_fast.kernels.cpu.tiles import LANES

COLUMNS = 3 * PANEL
"""queries at a time, where those of one row are not more"""
PAIR = 2 * LANES
"""what fills the depth of the matrix unit in bf16"""
_NOBODY = np.int32(1 << 30)
_FAST = {"reassoc", "nsz", "contract", "arcp"}


class Keys(NamedTuple):
    """What queries of one head see, in whole panels: of zeros behind the last one."""

    rows: np.ndarray
    """(keys, D)"""
    turned: np.ndarray
    """(panels, D, 64): the same as columns"""
    values: np.ndarray
    """(keys, D)"""


class _Queries(NamedTuple):
    """A chunk of them, and what is summed up for it."""

    columns: np.ndarray
    """(panels, D words, 64)"""
    upstream: np.ndarray
    """likewise, gradients of the output"""
    packed: np.ndarray
    """(D panels, words of queries, 64)"""
    packed_upstream: np.ndarray
    log_sums: np.ndarray
    """of base 2; infinite behind the last query"""
    deltas: np.ndarray
    sums: np.ndarray
    """(panels, D, 64): gradients"""
    rows: np.ndarray
    """(columns, D) scratch, as is the next"""
    wide: np.ndarray


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
    queries = _room_for_queries(whole_panels(max(COLUMNS, group)), size, q.dtype)
    room = _room_for_scores(queries, q.dtype)
    sums = np.empty((len(own.rows), queries.packed.shape[0] * PANEL), np.float32)
    before = np.empty(blocks.SAVED, np.uint8)
    _backward(
        start, stop, q, k, v, table, runs, prompt_len, prompts, scale, out, lse, d_out,
        d_shared[slots[start]], d_shared[-1], d_q, d_k, d_v, own, queries, room, sums,
        np.empty_like(sums), before,
    )  # fmt: skip


def room_for_keys(count, size, dtype, heads=()):
    """`Keys` of `count`, uninitialised."""
    rows = (*heads, whole_panels(count), size)
    turned = (*heads, whole_panels(count) // PANEL, size, PANEL)
    return Keys(np.empty(rows, dtype), np.empty(turned, dtype), np.empty(rows, dtype))


def _room_for_queries(columns, size, dtype):
    kind = np.uint32 if dtype.itemsize == 2 else np.float32
    panels, parts, per_word = columns // PANEL, -(-size // PANEL), 4 // dtype.itemsize
    narrow, low = (panels, size // per_word, PANEL), (parts, columns // per_word, PANEL)
    return _Queries(
        np.empty(narrow, kind), np.empty(narrow, kind), np.zeros(low, kind), np.zeros(low, kind),
        np.empty(columns, np.float32), np.empty(columns, np.float32),
        np.empty((panels, size, PANEL), np.float32), np.empty((columns, size), dtype),
        np.empty((PANEL, size), np.float32),
    )  # fmt: skip


def _room_for_scores(queries, dtype):
    block, wide = (LANES, PANEL), (PANEL, len(queries.log_sums))
    panel = (PANEL * dtype.itemsize // 4, PANEL)
    return _Scores(
        np.empty(block, np.float32), np.empty(block, np.float32), np.empty(wide, dtype),
        np.empty(wide, dtype), np.empty(panel, queries.columns.dtype),
    )  # fmt: skip


@njit(**BORROWED)
def pack_prompt_keys(start, stop, k, v, count, prompts):
    """`prompts` of the first `count` rows of k and v; a range of heads."""
    for head in range(start, stop):
        copy_rows(k, 0, count, head, prompts.rows[head], 0)
        copy_rows(v, 0, count, head, prompts.values[head], 0)
        _complete(prompts.rows[head], prompts.turned[head], prompts.values[head], count)


@njit(**BORROWED)
def _complete(rows, turned, values, count):
    """What follows from the first `count` rows of keys and values."""
    for row in range(count, whole_panels(count)):
        zero(rows[row])
        zero(values[row])
    for panel in range(whole_panels(count) // PANEL):
        turn_block(rows[panel * PANEL :], turned[panel])


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
        _complete(own.rows, own.turned, own.values, above + count)
        for row in range(whole_panels(above + count)):
            zero(d_keys[row])
            zero(d_values[row])
        for begin in range(0, count, at_once):
            rows = min(at_once, count - begin)
            which = (first + begin, rows, head * group, group)
            columns = _load(q, out, lse, d_out, which, scale, queries)
            if sees:
                _meet(
                    prompt, prompt_len, prompt_len, group, columns, scale, queries, room,
                    shared[head, 0], shared[head, 1],
                )  # fmt: skip
            ahead = above + begin
            _meet(own, ahead + rows, ahead, group, columns, scale, queries, room, d_keys, d_values)
            _store(queries, which, d_q)
        _hand_out(d_keys, line, runs, head, shared[head, 0], inner[head, 0], d_k)
        _hand_out(d_values, line, runs, head, shared[head, 1], inner[head, 1], d_v)
    blocks.end(queries.columns, before)


@njit(**BORROWED)
def _load(q, out, lse, d_out, which, scale, queries):
    """A chunk of queries; how many columns are in use.

    which: their first row, the number of rows, their first head and the number of heads.
    """
    first, rows, head, group = which
    count = rows * group
    columns = -(-count // PAIR) * PAIR
    _load_rows(q, which, columns, queries.rows)
    pack_columns(queries.rows, columns, queries.columns)
    pack_rows(queries.rows, columns, queries.packed)
    _load_rows(d_out, which, columns, queries.rows)
    pack_columns(queries.rows, columns, queries.upstream)
    pack_rows(queries.rows, columns, queries.packed_upstream)
    for column in range(count):
        i, h = first + column // group, head + column % group
        queries.log_sums[column] = lse[i, h] * np.float32(LOG2_E)
        queries.deltas[column] = _dot(d_out[i, h], out[i, h]) * scale
    for column in range(count, columns):
        queries.log_sums[column] = np.float32(np.inf)
        queries.deltas[column] = np.float32(0)
    for panel in range(-(-columns // PANEL)):
        for d in range(queries.sums.shape[1]):
            zero(queries.sums[panel, d])
    return columns


@njit(**BORROWED)
def _load_rows(source, which, columns, out):
    first, rows, head, group = which
    for row in range(rows):
        for g in range(group):
            copy_row(source[first + row, head + g], out[row * group + g])
    for column in range(rows * group, columns):
        zero(out[column])


@njit(**BORROWED)
def _meet(keys, count, ahead, group, columns, scale, queries, room, d_keys, d_values):
    """What `count` keys give to the sums of a chunk of queries, and the chunk to theirs.

    The first of the chunk's rows sees `ahead` keys and one more, if there are as many; each further
    row one more.
    """
    per_word = 4 // room.probs.itemsize
    step = room.probs.strides[0]
    for top in range(0, count, PANEL):
        height = min(PANEL, -(-(count - top) // PAIR) * PAIR)
        begin = _first_panel(top - ahead, group)
        for panel in range(begin, -(-columns // PANEL)):
            width = min(PANEL, columns - panel * PANEL)
            _score(keys, top, height, count, ahead, group, panel, width, scale, queries, room)
            for d in range(0, queries.sums.shape[1], LANES):
                left, place = keys.turned[top // PANEL, d], queries.sums[panel, d]
                multiply_lanes(
                    left.ctypes.data, left.nbytes, room.panel, height // per_word,
                    place.ctypes.data, 4 * PANEL, width, True,
                )  # fmt: skip
        for row in range(0, min(height, count - top), LANES):
            begin = _first_panel(top + row - ahead, group) * PANEL
            if begin < columns:
                words = (columns - begin) // per_word
                lefts = room.d_scores[row, begin:], room.probs[row, begin:]
                for part in range(queries.packed.shape[0]):
                    right = queries.packed[part, begin // per_word :]
                    place = d_keys[top + row, part * PANEL :].ctypes.data
                    multiply_lanes(
                        lefts[0].ctypes.data, step, right, words, place, d_keys.strides[0], PANEL,
                        True,
                    )  # fmt: skip
                    right = queries.packed_upstream[part, begin // per_word :]
                    place = d_values[top + row, part * PANEL :].ctypes.data
                    multiply_lanes(
                        lefts[1].ctypes.data, step, right, words, place, d_values.strides[0],
                        PANEL, True,
                    )  # fmt: skip


@njit(**INLINED)
def _first_panel(key, group):
    """Of queries, the first one that has some that see a key, which is so many behind what the
    first row sees for sure."""
    return max(0, key) * group // PANEL


@njit(**BORROWED)
def _score(keys, top, height, count, ahead, group, panel, width, scale, queries, room):
    """Probabilities and gradients of scores of keys [top, top + height) under a panel of
    queries."""
    columns, upstream = queries.columns[panel], queries.upstream[panel]
    log_sums = queries.log_sums[panel * PANEL :].ctypes.data
    deltas = queries.deltas[panel * PANEL :].ctypes.data
    words, line = columns.shape[0], 4 * PANEL
    scores, slopes = room.scores.ctypes.data, room.slopes.ctypes.data
    factor = scale * np.float32(LOG2_E)
    for row in range(0, height, LANES):
        left = keys.rows[top + row]
        if (top + row - ahead) * group < panel * PANEL + width:  # else nobody sees them
            multiply_lanes(
                left.ctypes.data, left.nbytes, columns, words, scores, line, width, False
            )
            left = keys.values[top + row]
            multiply_lanes(
                left.ctypes.data, left.nbytes, upstream, words, slopes, line, width, False
            )
        for key in range(row, row + LANES, 2):
            firsts = (
                _first(top + key, count, ahead, group, panel),
                _first(top + key + 1, count, ahead, group, panel),
            )
            offset = (key - row) * line
            pair_slopes(
                scores + offset, slopes + offset, log_sums, deltas, width // LANES, firsts, factor,
                scale, room.probs[key, panel * PANEL :], room.probs.strides[0],
                room.d_scores[key, panel * PANEL :].ctypes.data,
                room.panel[key * room.probs.itemsize // 4].ctypes.data,
            )  # fmt: skip


@njit(**INLINED)
def _first(key, count, ahead, group, panel):
    """The first query of a panel that sees a key."""
    if key >= count:
        return _NOBODY
    return np.int32((key - ahead) * group - panel * PANEL)


@njit(**BORROWED)
def _store(queries, which, d_q):
    """The sums of a chunk as rows of d_q."""
    first, rows, head, group = which
    wide = queries.wide
    for top in range(0, rows * group, PANEL):
        sums = queries.sums[top // PANEL]
        width = min(PANEL, rows * group - top)
        for column in range(0, width, LANES):
            for d in range(0, wide.shape[1], LANES):
                turn_words(
                    sums[d, column:].ctypes.data, sums.strides[0],
                    wide[column, d:].ctypes.data, wide.strides[0],
                )  # fmt: skip
        for column in range(width):
            at = top + column
            store_row(d_q[first + at // group, head + at % group], wide[column], np.float32(1))


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


@njit(fastmath=_FAST, **INLINED)
def _dot(left, right):
    total = np.float32(0)
    for d in range(left.size):
        total += value(left[d]) * value(right[d])
    return total
