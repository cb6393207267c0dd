"""What attention in tiles is made of: rows packed for products, their scores, their softmax.

Keys are counted in panels of 64: those of the prompt first, where a segment sees them, then its
own. Arrays are fp32, or bf16 that arrives as uint16; a word is what a product counts in, one fp32
or two bf16. What enters a product is rounded to the arrays' dtype, sums are fp32.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import overload

from polymath_fast.kernels.cpu import panel_blocks
from polymath_fast.kernels.cpu.attention_vectors import exponentials
from polymath_fast.kernels.cpu.jit import BORROWED, njit
from polymath_fast.kernels.cpu.layers import copy_row
from polymath_fast.kernels.cpu.moves import turn_pairs, turn_words, zip_words
from polymath_fast.kernels.cpu.panel_blocks import PANEL
from polymath_fast.kernels.cpu.scalar import LOG2_E, put
from polymath_fast.kernels.cpu.tiles import LANES

_NOTHING = np.zeros(LANES, np.uint16)


@njit(**BORROWED)
def whole_panels(count):
    """Columns of the panels that hold `count`."""
    return -(-count // PANEL) * PANEL


@njit(**BORROWED)
def copy_rows(source, first, count, head, out, at):
    """out[at : at + count] (., D) = rows [first, first + count) of `source` (T, H, D)."""
    for r in range(count):
        copy_row(source[first + r, head], out[at + r])


@njit(**BORROWED)
def pack_columns(rows, count, out):
    """out (panels, D words, 64): the first `count` of `rows` (., D) as columns, then zeros."""
    turned = count // LANES * LANES if out.shape[1] % LANES == 0 else 0
    for column in range(0, turned, LANES):
        block = out[column // PANEL]
        for word in range(0, out.shape[1], LANES):
            source = rows[column].ctypes.data + 4 * word
            place = block[word].ctypes.data + 4 * (column % PANEL)
            turn_words(source, rows.strides[0], place, block.strides[0])
    for column in range(turned, whole_panels(count)):
        block, within = out[column // PANEL], column % PANEL
        if column < count:
            packed = rows[column].view(out.dtype)
            for word in range(packed.size):
                block[word, within] = packed[word]
        else:
            for word in range(block.shape[0]):
                block[word, within] = 0


def pack_rows(rows, count, out):
    """out (D panels, whole panels of words of rows, 64): the first `count` of `rows` (., D), then
    zeros; in bf16 neighbours are interleaved."""
    raise NotImplementedError("compiled code only")


@overload(pack_rows, jit_options=BORROWED)
def _compiled_pack_rows(rows, count, out):
    if rows.dtype == types.uint16:

        def pack(rows, count, out):
            for pair in range(-(-count // PANEL) * PANEL // 2):
                for column in range(0, rows.shape[1], LANES):
                    low, high = _NOTHING.ctypes.data, _NOTHING.ctypes.data
                    if 2 * pair < count:
                        low = rows[2 * pair, column:].ctypes.data
                    if 2 * pair + 1 < count:
                        high = rows[2 * pair + 1, column:].ctypes.data
                    place = out[column // PANEL, pair].ctypes.data + 4 * (column % PANEL)
                    zip_words(low, high, place)
    else:

        def pack(rows, count, out):
            for row in range(-(-count // PANEL) * PANEL):
                for part in range(out.shape[0]):
                    left = part * PANEL
                    width = min(PANEL, rows.shape[1] - left)
                    if row < count:
                        copy_row(rows[row, left : left + width], out[part, row, :width])
                    else:
                        zero(out[part, row])

    return pack


def turn_block(rows, out):
    """out (D, 64): the first 64 of `rows` (., D) as columns."""
    raise NotImplementedError("compiled code only")


@overload(turn_block, jit_options=BORROWED)
def _compiled_turn_block(rows, out):
    size = 2 if rows.dtype == types.uint16 else 4
    turn, count = (turn_pairs, 2 * LANES) if size == 2 else (turn_words, LANES)

    def turn_all(rows, out):
        for row in range(0, PANEL, count):
            for d in range(0, rows.shape[1], LANES):
                source = rows[row].ctypes.data + size * d
                place = out[d].ctypes.data + size * row
                turn(source, rows.strides[0], place, out.strides[0])

    return turn_all


@njit()
def pack_prompt(start, stop, k, v, count, keys, values):
    """The first `count` keys as columns and values as rows, an entry a head; a range of heads."""
    own = np.empty((count, k.shape[2]), k.dtype)
    for head in range(start, stop):
        copy_rows(k, 0, count, head, own, 0)
        pack_columns(own, count, keys[head])
        copy_rows(v, 0, count, head, own, 0)
        pack_rows(own, count, values[head])


@njit(**BORROWED)
def products(rows, seen, prompt, count, own, out):
    """out (R, keys) fp32 = rows (R, D) of a block times the first `seen` columns of the prompt and,
    from the next whole panel on, the first `count` of its own; and some more up to a
    multiple of 16."""
    panel_blocks.products(rows, seen, prompt, out)
    panel_blocks.products(rows, count, own, out[:, -(-seen // PANEL) * PANEL :])


@njit(**BORROWED)
def weighted_sums(weights, seen, prompt, count, own, out):
    """out (R, D) fp32 = weights (R, keys) of a block times packed rows: `seen` of the prompt and,
    from the next whole panel on, `count` of its own. Weights of other keys are 0."""
    per_word = 4 // weights.itemsize
    step, out_step = weights.strides[0], out.strides[0]
    for part in range(own.shape[0]):
        left, place = weights.ctypes.data, out.ctypes.data + 4 * part * PANEL
        if seen:
            depth = panel_blocks.whole_words(prompt, -(-seen // per_word))
            panel_blocks.multiply(left, step, prompt[part], depth, place, out_step, False)
            left += -(-seen // PANEL) * PANEL * weights.itemsize
        depth = panel_blocks.whole_words(own, -(-count // per_word))
        panel_blocks.multiply(left, step, own[part], depth, place, out_step, seen > 0)


@njit(**BORROWED)
def zero(row):
    """row[:] = 0."""
    for j in range(row.size):
        row[j] = 0


@njit(**BORROWED)
def softmax(row, seen, base, own, scale, out):
    """Sum of the exponentials of a row and its log-sum-exp; they themselves go to `out`, 0 where
    there is no key: keys [0, seen) and [base, base + own) exist."""
    factor = scale * np.float32(LOG2_E)
    total, top = exponentials(
        row.ctypes.data, seen, base, base + own, row.size, factor, out, out.ctypes.data
    )
    return total, np.float32((top + math.log2(total)) * math.log(2))


@njit(**BORROWED)
def store_row(out, values, factor):
    """out = values * factor, as long as `out`."""
    for d in range(out.size):
        put(out, d, values[d] * factor)
