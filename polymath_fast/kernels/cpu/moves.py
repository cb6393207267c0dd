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


@intrinsic
def zip_words(typing_context, low, high, out):
    """out: 16 words, low half from the 16 bf16 at `low`, high half from those at `high`."""
    signature = types.void(types.uintp, types.uintp, types.uintp)
    return signature, _emit_zip_words


def _emit_zip_words(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
    low, high, out = args
    halves = ir.VectorType(ir.IntType(16), LANES).as_pointer()
    parts = [
        builder.zext(builder.load(builder.inttoptr(source, halves), align=2), _words)
        for source in (low, high)
    ]
    upper = builder.shl(parts[1], ir.Constant(_words, [16] * LANES))
    place = builder.inttoptr(out, _words.as_pointer())
    builder.store(builder.or_(parts[0], upper), place, align=4)
    return context.get_dummy_value()
