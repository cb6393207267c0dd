"""Intel's matrix unit (AMX): a block of fp32 sums of products of bf16 pairs, held in its tiles.

It has eight tiles of 16 rows of 64 bytes, and one instruction multiplies two of them into a third.
Three in a row hold 48 columns, four of them 64, as panels have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import llvmlite.binding
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from polymath_fast.kernels.cpu.moves import emit_fetch

ROWS = 16
WORDS = 16
_LINE = 64
_TILES = 8
FETCHED = 24 * _LINE
"""bytes that are fetched for later in each step: half of a panel's, so that the memory is as busy
under each of two blocks"""

_i8, _i64 = ir.IntType(8), ir.IntType(64)
_pointer = _i8.as_pointer()
CONFIG_BYTES = 64
_CONFIG = bytearray(CONFIG_BYTES)
_CONFIG[0] = 1  # the palette
for _tile in range(_TILES):
    _CONFIG[16 + 2 * _tile] = _LINE
    _CONFIG[48 + _tile] = ROWS


@cache
def available() -> bool:
    """Whether the processor has it, and the system lets this process use it."""
    features = llvmlite.binding.get_host_cpu_features()
    needed = ("amx-tile", "amx-bf16", "avx512bf16", "avx512bw")
    return all(features.get(name) for name in needed) and torch.cpu._init_amx()


@intrinsic
def configure(typing_context, saved):
    """Lay the tiles out for this thread; what was laid out before goes to the 64 bytes at the
    address `saved`."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        config = ir.Constant(ir.ArrayType(_i8, CONFIG_BYTES), _CONFIG)
        ours = cgutils.alloca_once_value(builder, config)
        _call(builder, "sttilecfg", [builder.inttoptr(args[0], _pointer)])
        _call(builder, "ldtilecfg", [builder.bitcast(ours, _pointer)])
        return context.get_dummy_value()

    return types.void(types.uintp), emit


@intrinsic
def restore(typing_context, saved):
    """Give the tiles back as `configure` found them: others on this thread may not look whether
    they still are what they made them."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], _pointer)
        used = builder.icmp_unsigned("!=", builder.load(place), _i8(0))
        with builder.if_else(used) as (then, otherwise):
            with then:
                _call(builder, "ldtilecfg", [place])
            with otherwise:
                _call(builder, "tilerelease", [])
        return context.get_dummy_value()

    return types.void(types.uintp), emit


def _make_block(height: int, width: int, of: int | None = None) -> Callable[..., None]:
    """The intrinsic for `height` times 16 rows and `width` times 16 columns, the first ones of
    panels `of` as many or more."""
    line = _LINE * (of or width)

    @intrinsic
    def block(typing_context, a, row_step, b, steps, out, out_step, add, later):
        """out (rows, columns) fp32 = or += rows of `a` times columns of `b`, over 16 `steps` pairs.

        `b` is an array packed as (words, columns) uint32, the first ones of a panel; `a` and `out`
        are addresses, row m of them at m times their step in bytes. later: addresses of what the
        memory is to bring meanwhile, or 0; of the first two `FETCHED` bytes a step, of the last
        what will be `out` of the next block. `configure` has been called.
        """
        signature = types.void(
            types.uintp,
            types.intp,
            b,
            types.intp,
            types.uintp,
            types.intp,
            types.boolean,
            types.UniTuple(types.uintp, 3),
        )

        def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            data = context.make_array(signature.args[2])(context, builder, args[2]).data
            args = [*args[:2], builder.ptrtoint(data, _i64), *args[3:]]
            _emit_block(builder, height, width, line, args)
            return context.get_dummy_value()

        return signature, emit

    return block


def _emit_block(
    builder: ir.IRBuilder, height: int, width: int, line: int, args: Sequence[ir.Value]
) -> None:
    """`line` bytes of b are one word of every column of its panel."""
    a, row_step, b, steps, out, out_step, add, later = args

    def below(start: ir.Value, step: ir.Value, count: int) -> ir.Value:
        return builder.add(start, builder.mul(step, _i64(ROWS * count)))

    sums = [
        (row * width + column, builder.add(below(out, out_step, row), _i64(_LINE * column)))
        for row in range(height)
        for column in range(width)
    ]
    with builder.if_else(add) as (then, otherwise):
        with then:
            for tile, place in sums:
                _tile_call(builder, "tileloadd64", tile, place, out_step)
        with otherwise:
            for tile, _ in sums:
                _call(builder, "tilezero", [_i8(tile)])
    lefts = [below(a, row_step, row) for row in range(height)]
    with cgutils.for_range(builder, steps) as loop:
        right = builder.add(b, builder.mul(loop.index, _i64(WORDS * line)))
        _emit_fetches(builder, later, loop.index, height, width, out_step)
        offset = builder.mul(loop.index, _i64(4 * WORDS))
        rows = [builder.add(left, offset) for left in lefts]
        _emit_step(builder, rows, row_step, right, width, line)
    for tile, place in sums:
        _tile_call(builder, "tilestored64", tile, place, out_step)


def _emit_fetches(
    builder: ir.IRBuilder,
    later: ir.Value,
    step: ir.Value,
    height: int,
    width: int,
    out_step: ir.Value,
) -> None:
    """What is fetched in this step of the loop: of sums, two rows."""
    *words, sums = (builder.extract_value(later, i) for i in range(3))
    for start in words:
        with builder.if_then(builder.icmp_unsigned("!=", start, _i64(0))):
            place = builder.add(start, builder.mul(step, _i64(FETCHED)))
            for offset in range(0, FETCHED, _LINE):
                emit_fetch(builder, builder.add(place, _i64(offset)))
    some = builder.icmp_unsigned("!=", sums, _i64(0))
    some = builder.and_(some, builder.icmp_unsigned("<", step, _i64(ROWS * height // 2)))
    with builder.if_then(some):
        row = builder.add(sums, builder.mul(out_step, builder.shl(step, _i64(1))))
        for place in (row, builder.add(row, out_step)):
            for offset in range(0, _LINE * width, _LINE):
                emit_fetch(builder, builder.add(place, _i64(offset)), to_write=True)


def _emit_step(
    builder: ir.IRBuilder,
    lefts: Sequence[ir.Value],
    row_step: ir.Value,
    right: ir.Value,
    width: int,
    line: int,
) -> None:
    """16 pairs of every row and column. Behind the sums comes a tile of the left factor, then as
    many as are left of the right one."""
    height = len(lefts)
    first = height * width
    spare = _TILES - first - 1
    for column in range(width):
        second = first + 1 + column % spare
        place = builder.add(right, _i64(_LINE * column))
        _tile_call(builder, "tileloadd64", second, place, _i64(line))
        order = range(height) if column % 2 == 0 else reversed(range(height))
        for number, row in enumerate(order):
            if column == 0 or number:  # else it is the one that came last
                _tile_call(builder, "tileloadd64", first, lefts[row], row_step)
            factors = [_i8(row * width + column), _i8(first), _i8(second)]
            _call(builder, "tdpbf16ps", factors)


def _tile_call(
    builder: ir.IRBuilder, name: str, tile: int, address: ir.Value, step: ir.Value
) -> None:
    _call(builder, name, [_i8(tile), builder.inttoptr(address, _pointer), step])


def _call(builder: ir.IRBuilder, name: str, args: Sequence[ir.Value]) -> None:
    kind = ir.FunctionType(ir.VoidType(), [each.type for each in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), args)


low_block = _make_block(1, 3)
"""16 x 48"""
high_block = _make_block(2, 3)
"""32 x 48: half the loads of `b`"""
wide_block = _make_block(1, 4)
"""16 x 64"""
narrow_blocks = tuple(_make_block(1, width, of=4) for width in (1, 2, 3))
"""16 x 16, 32 and 48, of panels of 64"""
