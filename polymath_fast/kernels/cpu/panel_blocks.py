"""Products of a few rows with panels of 64 columns, as attention has them: by the matrix unit where
there is one, else in tiles of registers; see `blocks`.
"""

from __future__ import annotations

from typing import Any

from numba.extending import overload

from polymath_fast.kernels.cpu import matrix_unit, tiles
from polymath_fast.kernels.cpu.blocks import by_unit
from polymath_fast.kernels.cpu.jit import BORROWED, njit
from polymath_fast.kernels.cpu.tiles import LANES

PANEL = 64
WORDS = matrix_unit.WORDS
_one, _two, _three = matrix_unit.narrow_blocks
_NOTHING = (0, 0, 0)
"""is fetched meanwhile: what they multiply is in the cache"""


def rows_of(panels: Any) -> int:
    """Rows of a block; compiled code may ask, too."""
    return matrix_unit.ROWS if by_unit(panels) else 6


@overload(rows_of, inline="always")
def _compiled_rows_of(panels):
    rows = rows_of(panels)
    return lambda panels: rows


def whole_words(panels, words):
    """How many of a row's words a product had better run over, where those behind `words` are 0."""
    raise NotImplementedError("compiled code only")


@overload(whole_words, inline="always")
def _compiled_whole_words(panels, words):
    if by_unit(panels):
        return lambda panels, words: -(-words // WORDS) * WORDS
    return lambda panels, words: words


def multiply(a, row_step, panel, words, out, out_step, add):
    """out (rows, 64) fp32 = or += rows of `a` times `words` words of `panel` (words, 64).

    `a` and `out` are addresses, row m of them at m times their step in bytes.
    """
    raise NotImplementedError("compiled code only")


@overload(multiply, inline="always")
def _compiled_multiply(a, row_step, panel, words, out, out_step, add):
    return _by_unit if by_unit(panel) else _in_registers


def _by_unit(a, row_step, panel, words, out, out_step, add):
    steps = words // WORDS
    matrix_unit.wide_block(a, row_step, panel, steps, out, out_step, add, _NOTHING)
    done = steps * WORDS
    if done < words:
        _add_rest(a + 4 * done, row_step, panel[done:], words - done, out, out_step)


@njit(**BORROWED)
def _add_rest(a, row_step, panel, words, out, out_step):
    """Words that do not fill a tile, in registers."""
    for top in range(0, matrix_unit.ROWS, 4):
        tiles.even_tile(
            a + top * row_step, row_step, 4, panel, words, out + top * out_step, out_step, True
        )


def _in_registers(a, row_step, panel, words, out, out_step, add):
    tiles.square_tile(a, row_step, 4, panel, words, out, out_step, add)


def multiply_lanes(a, row_step, panel, words, out, out_step, columns, add):
    """As `multiply`, of 16 rows and the first `columns`, 32 or 64, of a panel."""
    raise NotImplementedError("compiled code only")


@overload(multiply_lanes, jit_options=BORROWED)
def _compiled_multiply_lanes(a, row_step, panel, words, out, out_step, columns, add):
    if by_unit(panel):
        return _lanes_by_unit
    return _lanes_in_registers


def _lanes_by_unit(a, row_step, panel, words, out, out_step, columns, add):
    if columns == PANEL or words % WORDS:
        multiply(a, row_step, panel, words, out, out_step, add)
    else:
        _two(a, row_step, panel, words // WORDS, out, out_step, add, _NOTHING)


def _lanes_in_registers(a, row_step, panel, words, out, out_step, columns, add):
    for _ in range(LANES // 4):
        if columns == PANEL:
            tiles.even_tile(a, row_step, 4, panel, words, out, out_step, add)
        else:
            tiles.even_half_tile(a, row_step, 4, panel, words, out, out_step, add)
        a += 4 * row_step
        out += 4 * out_step


def products(rows, count, panels, out):
    """out (R, keys) fp32 = rows (R, D) of a block times the first `count` columns of `panels`, and
    some more up to a multiple of 16."""
    raise NotImplementedError("compiled code only")


@overload(products, jit_options=BORROWED)
def _compiled_products(rows, count, panels, out):
    if by_unit(panels):
        return _products_by_unit
    return lambda rows, count, panels, out: in_tiles(
        tiles.square_tile, tiles.narrow_tile, rows, count, panels, out
    )


def _products_by_unit(rows, count, panels, out):
    left, step, depth = rows.ctypes.data, rows.strides[0], panels.shape[1]
    place, out_step = out.ctypes.data, out.strides[0]
    steps = depth // WORDS
    for panel in range(-(-count // PANEL)):
        right, rest = panels[panel], count - panel * PANEL
        if depth % WORDS or rest > PANEL - LANES:
            multiply(left, step, right, depth, place, out_step, False)
        elif rest > 2 * LANES:  # columns that nobody needs would have to come from memory
            _three(left, step, right, steps, place, out_step, False, _NOTHING)
        elif rest > LANES:
            _two(left, step, right, steps, place, out_step, False, _NOTHING)
        else:
            _one(left, step, right, steps, place, out_step, False, _NOTHING)
        place += 4 * PANEL


@njit(inline="always")
def in_tiles(whole, narrow, rows, count, panels, out):
    """As `products`, by `whole`, a tile of R rows and 64 columns, and `narrow`, one of 16."""
    left, step, depth = rows.ctypes.data, rows.strides[0], panels.shape[1]
    place, out_step = out.ctypes.data, out.strides[0]
    for panel in range(-(-count // PANEL)):
        rest = count - panel * PANEL
        if rest > PANEL - LANES:
            whole(left, step, 4, panels[panel], depth, place, out_step, False)
        else:
            for column in range(0, rest, LANES):
                some = panels[panel, :, column:]
                narrow(left, step, 4, some, depth, place + 4 * column, out_step, False)
        place += 4 * PANEL
