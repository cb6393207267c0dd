"""The inner loop of the bf16 matrix products: a tile of fp32 sums held in registers.

AVX512-BF16 multiplies pairs of bf16 and adds both products to an fp32 lane. torch's own bf16
product rounds its result to bf16, which costs log-probs five digits; here the fp32 sums come out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

ROWS = 8
VECTORS = 3
LANES = 16
COLUMNS = VECTORS * LANES

_i32, _i64 = ir.IntType(32), ir.IntType(64)
_words = ir.VectorType(_i32, LANES)
_floats = ir.VectorType(ir.FloatType(), LANES)


class _BFloat16(ir.Type):
    """llvmlite knows no bfloat; this prints as one."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


_pairs = ir.VectorType(_BFloat16(), 2 * LANES)
_DOT = "llvm.x86.avx512bf16.dpbf16ps.512"


@cache
def available() -> bool:
    """True where the processor and the operating system offer AVX512-BF16."""
    features = llvmlite.binding.get_host_cpu_features()
    return bool(features.get("avx512bf16")) and bool(features.get("avx512bw"))


def _make_dot_tile(rows: int, vectors: int) -> Callable[..., None]:
    """The intrinsic for tiles of `rows` x 16 `vectors`; 24 sums leave registers for operands."""

    @intrinsic
    def dot_tile(typing_context, a, row_step, pair_step, b, pairs, out, out_step, add):
        """out (rows, columns) fp32 = or += sum over pairs of a's rows times b's columns.

        Addresses and steps are in bytes. The pair p of row m of `a` is the 32-bit word at
        a + m * row_step + p * pair_step; `b` is packed as (pairs, columns) words; row m of `out`
        starts at out + m * out_step.
        """
        signature = types.void(
            types.uintp,
            types.intp,
            types.intp,
            types.uintp,
            types.intp,
            types.uintp,
            types.intp,
            types.boolean,
        )

        def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            _emit_dot_tile(builder, args, rows, vectors)
            return context.get_dummy_value()

        return signature, emit

    return dot_tile


def _emit_dot_tile(builder: ir.IRBuilder, args: Any, row_count: int, vectors: int) -> None:
    a, row_step, pair_step, b, pairs, out, out_step, add = args
    dot = builder.module.globals.get(_DOT) or ir.Function(
        builder.module, ir.FunctionType(_floats, [_floats, _pairs, _pairs]), _DOT
    )

    def address(base: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
        return builder.inttoptr(builder.add(base, _i64(offset)), kind.as_pointer())

    rows = [builder.add(a, builder.mul(row_step, _i64(row))) for row in range(row_count)]
    places = [
        address(builder.add(out, builder.mul(out_step, _i64(row))), 4 * LANES * vector, _floats)
        for row in range(row_count)
        for vector in range(vectors)
    ]
    before = builder.block
    loop = builder.append_basic_block("pairs")
    after = builder.append_basic_block("sum")
    builder.branch(loop)

    builder.position_at_end(loop)
    pair = builder.phi(_i64)
    pair.add_incoming(_i64(0), before)
    sums = [builder.phi(_floats) for _ in places]
    for value in sums:
        value.add_incoming(ir.Constant(_floats, [0.0] * LANES), before)
    columns = builder.add(b, builder.mul(pair, _i64(4 * LANES * vectors)))
    right = [
        builder.bitcast(builder.load(address(columns, 4 * LANES * vector, _words), align=4), _pairs)
        for vector in range(vectors)
    ]
    step = builder.mul(pair, pair_step)
    updated = []
    for row in range(row_count):
        word = builder.load(address(builder.add(rows[row], step), 0, _i32), align=4)
        left = builder.insert_element(ir.Constant(_words, ir.Undefined), word, _i32(0))
        left = builder.shuffle_vector(left, left, ir.Constant(_words, [0] * LANES))
        left = builder.bitcast(left, _pairs)
        for vector in range(vectors):
            total = sums[row * vectors + vector]
            updated.append(builder.call(dot, [total, left, right[vector]]))
    following = builder.add(pair, _i64(1))
    pair.add_incoming(following, loop)
    for value, new in zip(sums, updated, strict=True):
        value.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", following, pairs), loop, after)

    builder.position_at_end(after)
    with builder.if_else(add) as (then, otherwise):
        with then:
            for value, place in zip(updated, places, strict=True):
                total = builder.fadd(builder.load(place, align=4), value)
                builder.store(total, place, align=4)
        with otherwise:
            for value, place in zip(updated, places, strict=True):
                builder.store(value, place, align=4)


dot_tile = _make_dot_tile(ROWS, VECTORS)
"""8 x 48: the fewest loads a product, for large matrices"""
square_tile = _make_dot_tile(6, 4)
"""6 x 64: no waste on heads of 64 or 128"""


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


@intrinsic
def word_at(typing_context, address):
    """The 32-bit word at an address."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], _i32.as_pointer()), align=4)

    return types.uint32(types.uintp), emit


@intrinsic
def atomic_add(typing_context, address, value):
    """Add to the 64-bit integer at an address that threads share; returns what was there before."""
    signature = types.int64(types.uintp, types.int64)

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], _i64.as_pointer())
        return builder.atomic_rmw("add", place, args[1], "seq_cst")

    return signature, emit


@intrinsic
def offer_core(typing_context):
    """Let another thread that waits for this core run first (sched_yield of the C library)."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        name = "sched_yield"
        function = builder.module.globals.get(name) or ir.Function(
            builder.module, ir.FunctionType(_i32, []), name
        )
        return builder.call(function, [])

    return types.int32(), emit
