"""Moves of a few vectors between addresses, where slices of arrays would cost more than that."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
_i32, _i64 = ir.IntType(32), ir.IntType(64)
_words = ir.VectorType(_i32, LANES)


@intrinsic
def copy(typing_context, source, target, size):
    """`size` bytes, a multiple of 32, from one address to another."""
    signature = types.void(types.uintp, types.uintp, types.intp)
    return signature, _emit_copy


def _emit_copy(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
    source, target, size = args
    kind = ir.VectorType(_i32, 8).as_pointer()
    with cgutils.for_range_slice(builder, _i64(0), size, _i64(32)) as (offset, _):
        origin, place = (
            builder.inttoptr(builder.add(each, offset), kind) for each in (source, target)
        )
        builder.store(builder.load(origin, align=2), place, align=2)
    return context.get_dummy_value()


def emit_fetch(builder: ir.IRBuilder, address: ir.Value, to_write: bool = False) -> None:
    """A line into the second-level cache, or, `to_write`, into the first, for this core alone."""
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _i32, _i32, _i32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    locality, data = _i32(3 if to_write else 2), _i32(1)
    place = builder.inttoptr(address, pointer)
    builder.call(function, [place, _i32(int(to_write)), locality, data])


@intrinsic
def zip_words(typing_context, low, high, out):
    """out: 16 words, low half from the 16 bf16 at `low`, high half from those at `high`."""
    signature = types.void(types.uintp, types.uintp, types.uintp)
    return signature, _emit_zip_words


def _emit_zip_words(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
    low, high, out = args
    place = builder.inttoptr(out, _words.as_pointer())
    builder.store(_zipped(builder, low, high), place, align=4)
    return context.get_dummy_value()


def _zipped(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    halves = ir.VectorType(ir.IntType(16), LANES).as_pointer()
    parts = [
        builder.zext(builder.load(builder.inttoptr(source, halves), align=2), _words)
        for source in (low, high)
    ]
    upper = builder.shl(parts[1], ir.Constant(_words, [16] * LANES))
    return builder.or_(parts[0], upper)


@intrinsic
def turn_pairs(typing_context, source, step, out, out_step):
    """out (16 rows, 16 words): word p of row r from the bf16 in column r of rows 2 p and 2 p + 1.

    `source` (32, 16) bf16 and `out` are addresses, their rows `step` and `out_step` bytes apart.
    """
    signature = types.void(types.uintp, types.intp, types.uintp, types.intp)
    return signature, _emit_turn_pairs


def _emit_turn_pairs(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
    source, step, out, out_step = args

    def row(start: ir.Value, step: ir.Value, number: int) -> ir.Value:
        return builder.add(start, builder.mul(step, _i64(number)))

    lines = [
        _zipped(builder, row(source, step, 2 * pair), row(source, step, 2 * pair + 1))
        for pair in range(LANES)
    ]
    _emit_turned(builder, lines, out, out_step)
    return context.get_dummy_value()


@intrinsic
def turn_words(typing_context, source, step, out, out_step):
    """out (16, 16) = source (16, 16), words of 32 bits, with rows and columns exchanged.

    Both are addresses, their rows `step` and `out_step` bytes apart.
    """
    signature = types.void(types.uintp, types.intp, types.uintp, types.intp)
    return signature, _emit_turn_words


def _emit_turn_words(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
    source, step, out, out_step = args
    lines = [builder.load(_line(builder, source, step, i), align=4) for i in range(LANES)]
    _emit_turned(builder, lines, out, out_step)
    return context.get_dummy_value()


def _emit_turned(
    builder: ir.IRBuilder, lines: list[ir.Value], out: ir.Value, out_step: ir.Value
) -> None:
    """The 16 columns of 16 lines of words, as rows `out_step` bytes apart."""
    for width in (1, 2, 4, 8):  # swap the off-diagonal quarters of squares of twice this width
        for i in range(LANES):
            if not i & width:
                lines[i], lines[i + width] = _swapped(builder, lines[i], lines[i + width], width)
    for number, line in enumerate(lines):
        builder.store(line, _line(builder, out, out_step, number), align=4)


def _line(builder: ir.IRBuilder, start: ir.Value, step: ir.Value, number: int) -> ir.Value:
    place = builder.add(start, builder.mul(step, _i64(number)))
    return builder.inttoptr(place, _words.as_pointer())


def _swapped(
    builder: ir.IRBuilder, upper: ir.Value, lower: ir.Value, width: int
) -> tuple[ir.Value, ir.Value]:
    lanes = range(LANES)
    first = [LANES + lane - width if lane & width else lane for lane in lanes]
    second = [LANES + lane if lane & width else lane + width for lane in lanes]
    masks = (ir.Constant(_words, mask) for mask in (first, second))
    return tuple(builder.shuffle_vector(upper, lower, mask) for mask in masks)
