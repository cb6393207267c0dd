"""Attention over a shared prompt in tiles: forward, one segment under one key head a task.

A segment is the prompt, a completion or, in a tree, a run of tokens that several completions share.
Its queries see the prompt, the segments that it continues, and its own rows causally. Keys of the
latter two are gathered and packed by the task; those of the prompt are packed once. Scores and
probabilities of a few query rows live in scratch memory that stays in the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from polymath_fast.kernels.cpu import blocks
from polymath_fast.kernels.cpu.attention_parts import (
    copy_rows,
    pack_columns,
    pack_rows,
    products,
    softmax,
    store_row,
    weighted_sums,
)
from polymath_fast.kernels.cpu.jit import BORROWED, njit
from polymath_fast.kernels.cpu.panel_blocks import PANEL, rows_of


class _Room(NamedTuple):
    """Scratch of one range of tasks."""

    keys: np.ndarray
    """of a path, packed as columns"""
    values: np.ndarray
    """of a path, packed as rows"""
    path: np.ndarray
    queries: np.ndarray
    """of a block, as are the rest"""
    scores: np.ndarray
    probs: np.ndarray
    sums: np.ndarray
    before: np.ndarray
    """see `blocks.begin`"""


def forward(
    start, stop, q, k, v, table, runs, prompt_len, prompt_keys, prompt_values, scale, most, out, lse
):
    """Tasks [start, stop): out (Tq, Hq, D) and lse (Tq, Hq) of their rows.

    table (segments, 7): first query row, rows, first key row, whether the segment sees the prompt,
    its first of `runs` and the one after its last, its place among the shared rows or -1. runs
    (., 3): first key row, rows, and place among the shared rows, of what lies between prompt and
    segment. most: keys of the longest path, the prompt apart. prompt_keys (Hkv, panels, D words,
    64), prompt_values (Hkv, D panels, words of rows, 64).
    """
    room = _room(q, k, prompt_keys, prompt_values, most)
    _forward(
        start, stop, q, k, v, table, runs, prompt_len, prompt_keys, prompt_values, scale, room, out,
        lse,
    )  # fmt: skip


def _room(q, k, prompt_keys, prompt_values, most):
    size, block, own_panels = q.shape[2], rows_of(prompt_keys), -(-most // PANEL)
    depth = own_panels * PANEL * k.itemsize // 4
    width = (prompt_keys.shape[1] + own_panels) * PANEL
    return _Room(
        np.empty((own_panels, prompt_keys.shape[2], PANEL), prompt_keys.dtype),
        np.zeros((prompt_values.shape[1], depth, PANEL), prompt_values.dtype),
        np.empty((most, size), k.dtype),
        np.zeros((block, size), q.dtype),
        np.empty((block, width), np.float32),
        np.zeros((block, width), q.dtype),
        np.empty((block, prompt_values.shape[1] * PANEL), np.float32),
        np.empty(blocks.SAVED, np.uint8),
    )


@njit(**BORROWED)
def _forward(
    start, stop, q, k, v, table, runs, prompt_len, prompt_keys, prompt_values, scale, room, out, lse
):
    key_heads = k.shape[1]
    group = q.shape[1] // key_heads
    block = rows_of(prompt_keys)
    scores, probs, sums = room.scores, room.probs, room.sums
    blocks.begin(prompt_keys, room.before)
    for task in range(start, stop):
        segment, head = divmod(task, key_heads)
        first, count, _, sees = table[segment, :4]
        seen = prompt_len if sees else 0
        base = -(-seen // PANEL) * PANEL
        above = gather(k, table[segment], runs, head, room.path)
        pack_columns(room.path, above + count, room.keys)
        gather(v, table[segment], runs, head, room.path)
        pack_rows(room.path, above + count, room.values)
        for query_head in range(head * group, (head + 1) * group):
            for top in range(0, count, block):
                height = min(block, count - top)
                copy_rows(q, first + top, height, query_head, room.queries, 0)
                last = above + top + height
                products(room.queries, seen, prompt_keys[head], last, room.keys, scores)
                used = base + -(-last // PANEL) * PANEL
                for r in range(height):
                    total, log_sum = softmax(
                        scores[r, :used], seen, base, above + top + r + 1, scale, probs[r, :used]
                    )
                    lse[first + top + r, query_head] = log_sum
                    scores[r, 0] = np.float32(1) / total
                weighted_sums(probs, seen, prompt_values[head], last, room.values, sums)
                for r in range(height):
                    store_row(out[first + top + r, query_head], sums[r], scores[r, 0])
    blocks.end(prompt_keys, room.before)


@njit(**BORROWED)
def gather(source, line, runs, head, out):
    """out: rows of a segment's path, from the prompt's end to its own last; how many are above."""
    above = 0
    for run in range(line[4], line[5]):
        copy_rows(source, runs[run, 0], runs[run, 1], head, out, above)
        above += runs[run, 1]
    copy_rows(source, line[2], line[1], head, out, above)
    return above
