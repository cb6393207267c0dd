"""The matrix products of decoding, a panel of outputs a task, with what follows at once on each.

Weights are packed (panels, words of inputs, 48). `following` is the address of the panel that this
thread will multiply by next, or 0, see `blocks.later`. R rows, I width of the MLP.
"""

from __future__ import annotations

import numpy as np

from polymath_fast.kernels.cpu import blocks, tiles
from polymath_fast.kernels.cpu.jit import BORROWED, njit
from polymath_fast.kernels.cpu.layers import round_row
from polymath_fast.kernels.cpu.scalar import exp, maximum, put, value
from polymath_fast.kernels.cpu.team import barrier, next_task

_LOWEST = np.float32(-80.0)


@njit(**BORROWED)
def add_projection(threads, counters, phase, x, count, packed, tile, before, after):
    """after = before + x @ a weight; tasks are panels of its outputs."""
    height = blocks.rows_of(packed)
    panel = next_task(counters, phase)
    while panel < packed.shape[0]:
        later = next_task(counters, phase)
        following = address(packed, later)
        left = panel * tiles.COLUMNS
        right = min(left + tiles.COLUMNS, after.shape[1])
        for top in range(0, count, height):
            _tile(x, top, count, packed[panel], following, tile)
            for r in range(min(height, count - top)):
                row = before[top + r, left:right]
                _add_row(tile[r], row, after[top + r, left:right])
        panel = later
    barrier(threads, counters, phase)


@njit(**BORROWED)
def project(x, count, packed, panel, following, tile, bias, out):
    height = blocks.rows_of(packed)
    left = panel * tiles.COLUMNS
    right = min(left + tiles.COLUMNS, out.shape[1])
    for top in range(0, count, height):
        _tile(x, top, count, packed, following, tile)
        for r in range(min(height, count - top)):
            if bias.size:
                _add(tile[r], bias[left:right])
            round_row(tile[r], out[top + r, left:right])


@njit(**BORROWED)
def activate(x, count, packed, panel, following, tile, out, kept_rows, kept):
    """One panel of silu(gate) * up; packed[0] holds the gate's columns, packed[1] those of up.
    Both go to rows of kept (rows, 96) as well."""
    height = blocks.rows_of(packed)
    left = panel * tiles.COLUMNS
    right = min(left + tiles.COLUMNS, out.shape[1])
    for top in range(0, count, height):
        _tile(x, top, count, packed[0], packed[1].ctypes.data, tile)
        _tile(x, top, count, packed[1], following, tile[height:])
        for r in range(min(height, count - top)):
            gate, up = tile[r], tile[height + r]
            _silu_times(gate, up, out[top + r, left:right])
            if top + r < kept_rows.size and kept_rows[top + r] >= 0:
                row = kept[kept_rows[top + r]]
                round_row(gate, row[: tiles.COLUMNS])
                round_row(up, row[tiles.COLUMNS :])


@njit(inline="always")
def address(panels, number):
    """Of that panel; 0 if there is none."""
    return panels[number].ctypes.data if number < panels.shape[0] else np.uintp(0)


@njit(inline="always")
def _tile(x, top, count, packed, following, scratch):
    """`following` is the address of the panel that comes next, see `blocks.later`."""
    height, words = blocks.rows_of(packed), packed.shape[0]
    block, number = top // height, -(-count // height)
    blocks.multiply(
        x.ctypes.data + top * x.strides[0], x.strides[0], packed, words, scratch.ctypes.data,
        scratch.strides[0], min(height, count - top), False,
        blocks.later(following, words, block, number, np.uintp(0)),
    )  # fmt: skip


@njit(**BORROWED)
def _add(row, other):
    for j in range(other.size):
        row[j] += other[j]


@njit(**BORROWED)
def _add_row(row, other, out):
    for j in range(out.size):
        put(out, j, value(other[j]) + row[j])


@njit(error_model="numpy", **BORROWED)
def _silu_times(gate, up, out):
    for j in range(out.size):
        sigmoid = np.float32(1) / (np.float32(1) + exp(-maximum(gate[j], _LOWEST)))
        put(out, j, gate[j] * sigmoid * up[j])
