"""Three bf16 matrix products with fp32 sums, as compiled kernels over a range of their output; the
first of them multiplies fp32 as well.

Arrays of bf16 arrive as uint16, or as uint32 where two neighbours in a row are one word. Left
operands are padded to whole tiles of rows, so a tile may read past the rows that count.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from polymath_fast.kernels.cpu.moves import zip_words
from polymath_fast.kernels.cpu.tiles import COLUMNS, LANES, ROWS, dot_tile

GROUP = 288
"""rows at most of a weight's gradient that are worked on together: the more, the fewer reads of the
other factor"""
CHAIN = 96
"""pairs of hidden entries that one chain of a logit sums up"""
DEPTH = 512
"""pairs that a gradient sums up before it goes to memory: what is read again and again meanwhile
stays in the second-level cache"""


@njit(nogil=True, cache=True)
def pack_weight(start, stop, weight, packed):
    """weight (V, H / 2) words -> packed (panels, H / 2, 48) words; entries past V are zero."""
    vocab, pairs = weight.shape
    for panel in range(start, stop):
        for column in range(COLUMNS):
            row = panel * COLUMNS + column
            for pair in range(pairs):
                packed[panel, pair, column] = weight[row, pair] if row < vocab else 0


@njit(nogil=True, cache=True)
def logits(start, stop, hidden, count, packed, out):
    """out (count, V) fp32 = hidden (rows, H / 2) words @ packed weight; the range is of panels.

    Sums of at most `CHAIN` pairs are added up: an error of fp32 rounding grows with the length of
    the chain, and log-probs show it.
    """
    pairs = packed.shape[1]
    blocks = -(-pairs // CHAIN)
    spare = np.empty((ROWS, COLUMNS), np.float32)
    for panel in range(start, stop):
        for block in range(blocks):
            first = pairs * block // blocks
            depth = pairs * (block + 1) // blocks - first
            for top in range(0, count, ROWS):
                _tile(
                    hidden,
                    top,
                    first,
                    packed[panel, first:],
                    depth,
                    out,
                    top,
                    count,
                    panel * COLUMNS,
                    block > 0,
                    spare,
                )


@njit(nogil=True, cache=True)
def pack_pairs(start, stop, source, packed):
    """source (K, columns) -> packed (panels, K / 2, 48) words of two rows; the range is of K / 2.

    Rows past K and columns past the last are zero.
    """
    for pair in range(start, stop):
        for panel in range(packed.shape[0]):
            left = panel * COLUMNS
            width = min(COLUMNS, source.shape[1] - left)
            _interleave(source, 2 * pair, 1, left, width, packed[panel, pair:])


@njit(nogil=True, cache=True)
def hidden_gradient(start, stop, slopes, packed, out):
    """out (M, H) fp32 = slopes (rows, V / 2) words @ packed weight; the range is one of M."""
    spare = np.empty((ROWS, COLUMNS), np.float32)
    pairs = packed.shape[1]
    for first in range(0, pairs, DEPTH):
        depth = min(DEPTH, pairs - first)
        for panel in range(packed.shape[0]):
            block = packed[panel, first:]
            for top in range(start, stop, ROWS):
                _tile(
                    slopes,
                    top,
                    first,
                    block,
                    depth,
                    out,
                    top,
                    stop,
                    panel * COLUMNS,
                    first > 0,
                    spare,
                )


@njit(nogil=True, cache=True)
def weight_gradient(start, stop, slopes, packed, out, add):
    """out (V, H) fp32 = or += slopes (count, V).T @ packed hidden; the range is one of V, of a few
    hundred rows at most."""
    pairs = packed.shape[1]
    spare = np.empty((ROWS, COLUMNS), np.float32)
    padded = -(-(stop - start) // LANES) * LANES
    group = np.empty((min(pairs, DEPTH), padded), np.uint32)
    for first in range(0, pairs, DEPTH):
        depth = min(DEPTH, pairs - first)
        _interleave(slopes, 2 * first, depth, start, stop - start, group)
        for panel in range(packed.shape[0]):
            right = packed[panel, first:]
            for top in range(start, stop, ROWS):
                _put(
                    group.ctypes.data + 4 * (top - start),
                    4,
                    group.strides[0],
                    right,
                    depth,
                    out,
                    top,
                    stop,
                    panel * COLUMNS,
                    add or first > 0,
                    spare,
                )


@njit(inline="always")
def _tile(a, row, pair, b, pairs, out, top, bottom, left, add, spare):
    address = a.ctypes.data + row * a.strides[0] + 4 * pair
    _put(address, a.strides[0], 4, b, pairs, out, top, bottom, left, add, spare)


@njit(inline="always")
def _put(a, row_step, pair_step, b, pairs, out, top, bottom, left, add, spare):
    """One tile of `out` at (top, left); rows from `bottom` on are not written."""
    if top + ROWS <= bottom and left + COLUMNS <= out.shape[1]:
        place = out.ctypes.data + top * out.strides[0] + 4 * left
        dot_tile(a, row_step, pair_step, b, pairs, place, out.strides[0], add)
    else:
        dot_tile(a, row_step, pair_step, b, pairs, spare.ctypes.data, 4 * COLUMNS, False)
        for row in range(min(ROWS, bottom - top)):
            for column in range(min(COLUMNS, out.shape[1] - left)):
                before = out[top + row, left + column] if add else np.float32(0)
                out[top + row, left + column] = before + spare[row, column]


@njit(nogil=True, cache=True)
def _interleave(source, top, pairs, left, width, out):
    """out (pairs, columns) words: rows 2 p and 2 p + 1 of `source`, columns left to left + width.

    What lies past the rows of `source`, or past `width`, is zero.
    """
    whole = width - width % LANES
    for pair in range(pairs):
        row = top + 2 * pair
        both = row + 1 < source.shape[0]
        low = source.ctypes.data + row * source.strides[0] + 2 * left
        place = out.ctypes.data + pair * out.strides[0]
        if both:
            high = low + source.strides[0]
            for column in range(0, whole, LANES):
                zip_words(low + 2 * column, high + 2 * column, place + 4 * column)
        for column in range(whole if both else 0, width):
            upper = source[row + 1, left + column] if both else np.uint16(0)
            out[pair, column] = source[row, left + column] | upper << 16
        for column in range(width, out.shape[1]):
            out[pair, column] = 0
