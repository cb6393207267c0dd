"""Queries as attention's backward reads them, and their gradients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from polymath_fast.kernels.cpu.attention_parts import (
    pack_columns,
    pack_rows,
    store_row,
    whole_panels,
    zero,
)
from polymath_fast.kernels.cpu.jit import BORROWED, INLINED, njit
from polymath_fast.kernels.cpu.layers import copy_row
from polymath_fast.kernels.cpu.moves import turn_words
from polymath_fast.kernels.cpu.panel_blocks import PANEL
from polymath_fast.kernels.cpu.scalar import LOG2_E, value
from polymath_fast.kernels.cpu.tiles import LANES

COLUMNS = 3 * PANEL
"""queries at a time, where those of one row are not more"""
PAIR = 2 * LANES
"""what fills the depth of the matrix unit in bf16"""
_FAST = {"reassoc", "nsz", "contract", "arcp"}


class Queries(NamedTuple):
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


def room_for_queries(group, size, dtype):
    """Uninitialised; group: queries of a row."""
    columns = whole_panels(max(COLUMNS, group))
    kind = np.uint32 if dtype.itemsize == 2 else np.float32
    panels, parts, per_word = columns // PANEL, -(-size // PANEL), 4 // dtype.itemsize
    narrow, low = (panels, size // per_word, PANEL), (parts, columns // per_word, PANEL)
    return Queries(
        np.empty(narrow, kind), np.empty(narrow, kind), np.zeros(low, kind), np.zeros(low, kind),
        np.empty(columns, np.float32), np.empty(columns, np.float32),
        np.empty((panels, size, PANEL), np.float32), np.empty((columns, size), dtype),
        np.empty((PANEL, size), np.float32),
    )  # fmt: skip


@njit(**BORROWED)
def load(q, out, lse, d_out, which, scale, queries):
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
def store(queries, which, d_q):
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


@njit(fastmath=_FAST, **INLINED)
def _dot(left, right):
    total = np.float32(0)
    for d in range(left.size):
        total += value(left[d]) * value(right[d])
    return total
