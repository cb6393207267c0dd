"""Two bf16 matrix products with fp32 sums, as compiled kernels over a range of their output, and
the packing of their factors; the first of them multiplies fp32 as well.

Arrays of bf16 arrive as uint16, or as uint32 where two neighbours in a row are one word. Left
operands have room for whole blocks of rows, so a block may read past the rows that count.
"""

from __future__ import annotations

import numpy as np

from polymath_fast.kernels.cpu import blocks
from polymath_fast.kernels.cpu.jit import njit
from polymath_fast.kernels.cpu.moves import zip_words
from polymath_fast.kernels.cpu.tiles import COLUMNS, LANES

DEPTH = 512
"""pairs that a gradient sums up before it goes to memory: what is read again and again meanwhile
stays in the second-level cache"""


@njit()
def pack_weight(start, stop, weight, packed):
    """weight (V, H / 2) words -> packed (panels, H / 2, 48) words; entries past V are zero."""
    vocab, pairs = weight.shape
    for panel in range(start, stop):
        for column in range(COLUMNS):
            row = panel * COLUMNS + column
            for pair in range(pairs):
                packed[panel, pair, column] = weight[row, pair] if row < vocab else 0


@njit()
def logits(start, stop, hidden, count, packed, out):
    """out (count, V) fp32 = hidden (rows, H / 2) words @ packed weight; the range is of panels."""
    spare = np.empty((blocks.rows_of(packed), COLUMNS), np.float32)
    before = np.empty(blocks.SAVED, np.uint8)
    blocks.begin(packed, before)
    for panel in range(start, stop):
        put_logits(panel, hidden, count, packed, out, spare)
    blocks.end(packed, before)


@njit()
def put_logits(panel, hidden, count, packed, out, spare):
    """Those of one panel, where `blocks.begin` has been called.

    Sums of at most `chain_of` pairs are added up: an error of fp32 rounding grows with the length
    of the chain, and log-probs show it.
    """
    pairs = packed.shape[1]
    chains = -(-pairs // blocks.chain_of(packed))
    height = blocks.rows_of(packed)
    for chain in range(chains):
        first = pairs * chain // chains
        depth = pairs * (chain + 1) // chains - first
        some = packed[panel, first:]
        following = packed[panel, first + depth :].ctypes.data
        for top in range(0, count, height):
            _put(
                hidden.ctypes.data + top * hidden.strides[0] + 4 * first, hidden.strides[0], some,
                depth, out, 0, top, count, panel * COLUMNS, chain > 0, True, following, spare,
            )  # fmt: skip


@njit()
def pack_pairs(start, stop, source, packed):
    """source (K, columns) -> packed (panels, K / 2, 48) words of two rows; the range is of K / 2.

    Rows past K and columns past the last are zero.
    """
    for pair in range(start, stop):
        for panel in range(packed.shape[0]):
            left = panel * COLUMNS
            width = min(COLUMNS, source.shape[1] - left)
            _interleave(source, 2 * pair, 1, left, width, packed[panel, pair:])


@njit()
def hidden_gradient(start, stop, slopes, packed, out):
    """out (M, H) fp32 = slopes (rows, V / 2) words @ packed weight; the range is one of M."""
    spare = np.empty((blocks.rows_of(packed), COLUMNS), np.float32)
    before = np.empty(blocks.SAVED, np.uint8)
    blocks.begin(packed, before)
    for first in range(0, packed.shape[1], DEPTH):
        a = slopes.ctypes.data + start * slopes.strides[0] + 4 * first
        put_panels(a, slopes.strides[0], packed, first, out, start, stop, first > 0, spare)
    blocks.end(packed, before)


@njit(inline="always")
def put_panels(a, row_step, packed, first, out, start, stop, add, spare):
    """Rows [start, stop) of `out` = or += rows at the address `a` times `packed` from its word
    `first` on, `DEPTH` words at most."""
    height, depth = blocks.rows_of(packed), min(DEPTH, packed.shape[1] - first)
    for panel in range(packed.shape[0]):
        some, following = packed[panel, first:], np.uintp(0)
        if panel + 1 < packed.shape[0]:
            following = packed[panel + 1, first:].ctypes.data
        for top in range(start, stop, height):
            left = a + (top - start) * row_step
            _put(
                left, row_step, some, depth, out, start, top, stop, panel * COLUMNS, add, False,
                following, spare,
            )  # fmt: skip


@njit(inline="always")
def _put(a, row_step, b, words, out, start, top, stop, left, add, apart, following, spare):
    """The block of rows [start, stop) of `out` at (top, left), = or +=.

    a, row_step, b, words: see `blocks.multiply`; following: `blocks.later`. apart: it is a sum of
    its own, which is then added to what `out` holds.
    """
    height = blocks.rows_of(b)
    count, below = min(height, stop - top), top + height
    place = out.ctypes.data + top * out.strides[0] + 4 * left
    soon = np.uintp(0)
    if below < stop:
        soon = place + height * out.strides[0]
    number = (top - start) // height
    later = blocks.later(following, words, number, -(-(stop - start) // height), soon)
    inside = below <= stop and left + COLUMNS <= out.shape[1]
    if inside and not (add and apart and blocks.continues(b)):
        blocks.multiply(a, row_step, b, words, place, out.strides[0], count, add, later)
        return
    blocks.multiply(a, row_step, b, words, spare.ctypes.data, spare.strides[0], count, False, later)
    for row in range(count):
        for column in range(min(COLUMNS, out.shape[1] - left)):
            held = out[top + row, left + column] if add else np.float32(0)
            out[top + row, left + column] = held + spare[row, column]


@njit()
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
