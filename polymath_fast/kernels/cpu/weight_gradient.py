"""The product that makes a weight's gradient from bf16, with fp32 sums: over rows of both factors.

One of them is packed by `bf16.pack_pairs`; of the other the kernel turns what it works on.
"""

from __future__ import annotations

import numpy as np

from polymath_fast.kernels.cpu import blocks
from polymath_fast.kernels.cpu.bf16 import DEPTH, put_panels
from polymath_fast.kernels.cpu.jit import njit
from polymath_fast.kernels.cpu.moves import turn_pairs
from polymath_fast.kernels.cpu.tiles import COLUMNS, LANES

GROUP = 288
"""rows at most of the gradient that are worked on together: the more, the fewer reads of the packed
factor"""


@njit()
def weight_gradient(start, stop, slopes, packed, out, add):
    """out (V, H) fp32 = or += slopes (count, V).T @ packed hidden; the range is one of V, of a few
    hundred rows at most."""
    pairs = packed.shape[1]
    spare = np.empty((blocks.rows_of(packed), COLUMNS), np.float32)
    rows = -(-(stop - start) // blocks.PADDING) * blocks.PADDING
    # a line more than a power of two: rows would share the same few sets of the cache
    turned = np.empty((rows, min(pairs, DEPTH) + 2 * LANES), np.uint32)
    before = np.empty(blocks.SAVED, np.uint8)
    blocks.begin(packed, before)
    for first in range(0, pairs, DEPTH):
        _turn(slopes[2 * first :], min(DEPTH, pairs - first), start, stop, turned)
        more = add or first > 0
        put_panels(
            turned.ctypes.data, turned.strides[0], packed, first, out, start, stop, more, spare
        )
    blocks.end(packed, before)


@njit()
def _turn(source, pairs, start, stop, out):
    """out (columns, pairs) words: rows 2 p and 2 p + 1 of `source` (rows, V) in columns [start,
    stop); what lies past its rows is zero."""
    step, whole = source.strides[0], min(pairs, source.shape[0] // 2)
    last, right = whole - whole % LANES, stop - (stop - start) % LANES
    for pair in range(0, last, LANES):
        place = source.ctypes.data + 2 * pair * step
        for column in range(start, right, LANES):  # next to each other: they share lines
            target = out[column - start].ctypes.data + 4 * pair
            turn_pairs(place + 2 * column, step, target, out.strides[0])
    for column in range(start, stop):
        for pair in range(last if column < right else 0, pairs):
            both = 2 * pair + 1 < source.shape[0]
            upper = source[2 * pair + 1, column] if both else np.uint16(0)
            out[column - start, pair] = source[2 * pair, column] | upper << 16
