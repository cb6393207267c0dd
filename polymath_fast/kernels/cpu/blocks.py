"""Blocks of a matrix product with fp32 sums, by the matrix unit where there is one, else in tiles
of registers.

What is written for these is compiled for one or the other: `rows_of`, `multiply`, `begin` and `end`
depend on the dtype of the packed factor and on the processor alone.
"""

from __future__ import annotations

from typing import Any

from numba.extending import overload

from polymath_fast.kernels.cpu import matrix_unit, tiles
from polymath_fast.kernels.cpu.jit import njit

PADDING = matrix_unit.ROWS
"""left operands have memory for a multiple of so many rows"""
SAVED = matrix_unit.CONFIG_BYTES
_UNIT_ROWS = 2 * matrix_unit.ROWS
_HAS_UNIT = matrix_unit.available()
"""asked for when this is imported: compiled code that comes from the cache asks no more"""


def by_unit(packed: Any) -> bool:
    """Whether blocks of a factor, an array or numba's type of it, are the matrix unit's."""
    return str(packed.dtype) == "uint32" and _HAS_UNIT


def rows_of(packed: Any) -> int:
    """Rows of a block, at most; compiled code may ask, too."""
    return _UNIT_ROWS if by_unit(packed) else tiles.ROWS


@overload(rows_of, inline="always")
def _compiled_rows_of(packed):
    rows = rows_of(packed)
    return lambda packed: rows


def begin(packed, before):
    """What a thread calls before its first block, and `end` after its last; before (SAVED,) uint8
    is scratch for the time between."""
    raise NotImplementedError("compiled code only")


@overload(begin, inline="always")
def _compiled_begin(packed, before):
    if by_unit(packed):
        return lambda packed, before: matrix_unit.configure(before.ctypes.data)
    return lambda packed, before: None


def end(packed, before):
    """See `begin`."""
    raise NotImplementedError("compiled code only")


@overload(end, inline="always")
def _compiled_end(packed, before):
    if by_unit(packed):
        return lambda packed, before: matrix_unit.restore(before.ctypes.data)
    return lambda packed, before: None


def chain_of(packed):
    """Words that one fp32 sum runs over at most, where its rounding matters.

    An instruction of the matrix unit sums up 16 of them by itself before it adds them to the rest.
    """
    raise NotImplementedError("compiled code only")


@overload(chain_of, inline="always")
def _compiled_chain_of(packed):
    chain = 384 if by_unit(packed) else 96
    return lambda packed: chain


def continues(packed):
    """Whether what is added to a block continues its sums, instead of being a sum of its own."""
    raise NotImplementedError("compiled code only")


@overload(continues, inline="always")
def _compiled_continues(packed):
    unit = by_unit(packed)
    return lambda packed: unit


@njit(inline="always")
def later(following, words, block, blocks, sums):
    """What `multiply` has the memory bring meanwhile, for number `block` of `blocks` of rows: half
    of the as many `words` at `following` under each of the first two, or all under a single one;
    and what is at `sums`. Addresses, 0: nothing."""
    half = words // matrix_unit.WORDS * matrix_unit.FETCHED
    nothing = following * 0
    first = following + block * half if following != 0 and block < 2 else nothing
    second = following + half if following != 0 and blocks == 1 else nothing
    return first, second, sums + nothing


def multiply(a, row_step, packed, words, out, out_step, count, add, later):
    """out (rows, 48) fp32 = or += rows of `a` times `words` words of `packed` (words, 48).

    `a` and `out` are addresses, row m of them at m times their step in bytes. `count` rows, at most
    `rows_of`, matter; all of a block's may be read and written. later: what the function of
    that name returns.
    """
    raise NotImplementedError("compiled code only")


@overload(multiply, inline="always")
def _compiled_multiply(a, row_step, packed, words, out, out_step, count, add, later):
    return _by_unit if by_unit(packed) else _in_registers


def _by_unit(a, row_step, packed, words, out, out_step, count, add, later):
    steps = words // matrix_unit.WORDS
    if count > matrix_unit.ROWS:
        matrix_unit.high_block(a, row_step, packed, steps, out, out_step, add, later)
    else:
        matrix_unit.low_block(a, row_step, packed, steps, out, out_step, add, later)
    done = steps * matrix_unit.WORDS
    if done < words:
        _add_rest(a + 4 * done, row_step, packed[done:], words - done, out, out_step, count)


@njit()
def _add_rest(a, row_step, packed, words, out, out_step, count):
    """Words that do not fill a tile, in registers."""
    for top in range(0, -(-count // matrix_unit.ROWS) * matrix_unit.ROWS, tiles.ROWS):
        tiles.dot_tile(
            a + top * row_step, row_step, 4, packed, words, out + top * out_step, out_step, True
        )


def _in_registers(a, row_step, packed, words, out, out_step, count, add, later):
    tiles.dot_tile(a, row_step, 4, packed, words, out, out_step, add)
