"""The inner loop of the CPU's matrix products: a tile of fp32 sums held in registers.

AVX512-BF16 multiplies pairs of bf16 and adds both products to an fp32 lane. torch's own bf16
product rounds its result to bf16, which costs log-probs five digits; here the fp32 sums come out.
The same tiles exist for fp32. Both count in words of 32 bits: a pair of bf16, or one fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any

import llvmlite.binding
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from polymath_fast.kernels.cpu.scalar import emit_rounded

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
_wide = ir.VectorType(_i32, 2 * LANES)
_DOT = "llvm.x86.avx512bf16.dpbf16ps.512"


@cache
def available(dtype: torch.dtype) -> bool:
    """True where tiles of `dtype` are fast: bf16 with AVX512-BF16, fp32 with fused multiply-add."""
    if dtype == torch.bfloat16:
        return _multiplies_pairs()
    return dtype == torch.float32 and _has("fma")


def _multiplies_pairs() -> bool:
    return _has("avx512bf16") and _has("avx512bw")


@cache
def _has(feature: str) -> bool:
    return bool(llvmlite.binding.get_host_cpu_features().get(feature))


def _make_dot_tile(rows: int, vectors: int, of: int | None = None) -> Callable[..., None]:
    """The intrinsic for tiles of `rows` x 16 `vectors`, in panels `of` as many or more."""
    line = 4 * LANES * (of or vectors)

    @intrinsic
    def dot_tile(typing_context, a, row_step, word_step, b, words, out, out_step, add):
        """out (rows, columns) fp32 = or += sum over words of a's rows times b's columns.

        `b` is an array packed as (words, columns): uint32 pairs of bf16, or float32, the first
        columns of a panel; `a` and `out` are addresses, steps are in bytes. The word w of row m of
        `a` lies at a + m * row_step + w * word_step; row m of `out` starts at out + m * out_step.
        At least one word is read.
        """
        signature = types.void(
            types.uintp,
            types.intp,
            types.intp,
            b,
            types.intp,
            types.uintp,
            types.intp,
            types.boolean,
        )

        def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            array = signature.args[3]
            data = context.make_array(array)(context, builder, args[3]).data
            args = [*args[:3], builder.ptrtoint(data, _i64), *args[4:]]
            kind = _Pairs() if array.dtype == types.uint32 else _Singles()
            for part in kind.parts(rows, vectors * LANES):
                _emit_dot_tile(builder, args, kind, line, *part)
            return context.get_dummy_value()

        return signature, emit

    return dot_tile


def emit_halves(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    """Two vectors of fp32 rounded to bf16, ties to even: 32 halves, those of `low` first."""
    halves = ir.VectorType(ir.IntType(16), 2 * LANES)
    if _multiplies_pairs():
        kind = ir.FunctionType(_pairs, [_floats, _floats])
        name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.bitcast(builder.call(function, [high, low]), halves)
    parts = [
        builder.trunc(emit_rounded(builder, each), ir.VectorType(ir.IntType(16), LANES))
        for each in (low, high)
    ]
    return builder.shuffle_vector(*parts, ir.Constant(_wide, list(range(2 * LANES))))


class _Pairs:
    """Words are pairs of bf16. Processors without the instruction get the same sums from several
    others: slowly, but what is written for tiles can be tested everywhere."""

    lanes = LANES
    right = _words

    def parts(self, rows: int, columns: int) -> Iterator[tuple[range, range]]:
        """24 sums leave registers for operands."""
        yield range(rows), range(0, columns, LANES)

    def dot(self, builder: ir.IRBuilder, total: ir.Value, left: ir.Value, right: ir.Value):
        """total + both products of each pair."""
        if _multiplies_pairs():
            kind = ir.FunctionType(_floats, [_floats, _pairs, _pairs])
            dot = cgutils.get_or_insert_function(builder.module, kind, _DOT)
            return builder.call(dot, [total, *(builder.bitcast(x, _pairs) for x in (left, right))])
        sixteen, upper = (ir.Constant(_words, [value] * LANES) for value in (16, -65536))
        low = [builder.bitcast(builder.shl(x, sixteen), _floats) for x in (left, right)]
        high = [builder.bitcast(builder.and_(x, upper), _floats) for x in (left, right)]
        return _fma(builder, *high, _fma(builder, *low, total))


class _Singles:
    """Words are fp32. Without AVX512 there are 16 registers of 8 lanes, and a tile is computed in
    parts whose sums, at most 12, stay in them."""

    def __init__(self) -> None:
        self.lanes = LANES if _has("avx512f") else LANES // 2
        self.right = ir.VectorType(ir.FloatType(), self.lanes)

    def parts(self, rows: int, columns: int) -> Iterator[tuple[range, range]]:
        if _has("avx512f"):
            yield range(rows), range(0, columns, self.lanes)
            return
        height, width = (rows, 2) if rows <= 6 else (rows // 2, 3)
        width *= self.lanes
        for top, left in product(range(0, rows, height), range(0, columns, width)):
            yield range(top, top + height), range(left, left + width, self.lanes)

    def dot(self, builder: ir.IRBuilder, total: ir.Value, left: ir.Value, right: ir.Value):
        """total + left * right, rounded once."""
        return _fma(builder, builder.bitcast(left, self.right), right, total)


def _fma(builder: ir.IRBuilder, left: ir.Value, right: ir.Value, total: ir.Value) -> ir.Value:
    name = f"llvm.fma.v{total.type.count}f32"
    kind = ir.FunctionType(total.type, [total.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [left, right, total])


def _emit_dot_tile(
    builder: ir.IRBuilder, args: Any, kind: _Pairs | _Singles, line: int, rows: range, lefts: range
) -> None:
    """The part of a tile with these rows and, from these columns on, vectors; `line` bytes of b are
    one word of every column."""
    a, row_step, word_step, b, words, out, out_step, add = args
    lanes = kind.lanes
    floats, integers = (ir.VectorType(each, lanes) for each in (ir.FloatType(), _i32))

    def address(base: ir.Value, offset: int, type_: ir.Type) -> ir.Value:
        return builder.inttoptr(builder.add(base, _i64(offset)), type_.as_pointer())

    starts = [builder.add(a, builder.mul(row_step, _i64(row))) for row in rows]
    places = [
        address(builder.add(out, builder.mul(out_step, _i64(row))), 4 * left, floats)
        for row in rows
        for left in lefts
    ]
    before = builder.block
    loop = builder.append_basic_block("words")
    after = builder.append_basic_block("sum")
    builder.branch(loop)

    builder.position_at_end(loop)
    word = builder.phi(_i64)
    word.add_incoming(_i64(0), before)
    sums = [builder.phi(floats) for _ in places]
    for value in sums:
        value.add_incoming(ir.Constant(floats, [0.0] * lanes), before)
    columns = builder.add(b, builder.mul(word, _i64(line)))
    right = [builder.load(address(columns, 4 * left, kind.right), align=4) for left in lefts]
    step = builder.mul(word, word_step)
    updated = []
    for start in starts:
        bits = builder.load(address(builder.add(start, step), 0, _i32), align=4)
        every = builder.insert_element(ir.Constant(integers, ir.Undefined), bits, _i32(0))
        every = builder.shuffle_vector(every, every, ir.Constant(integers, [0] * lanes))
        for vector in right:
            updated.append(kind.dot(builder, sums[len(updated)], every, vector))
    following = builder.add(word, _i64(1))
    word.add_incoming(following, loop)
    for value, new in zip(sums, updated, strict=True):
        value.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", following, words), loop, after)

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
narrow_tile = _make_dot_tile(6, 1, of=4)
"""6 x 16, of panels of 64"""
even_tile = _make_dot_tile(4, 4)
"""4 x 64: a quarter of the rows of the matrix unit"""
even_half_tile = _make_dot_tile(4, 2, of=4)
"""4 x 32, of panels of 64"""
low_tile = _make_dot_tile(3, 4)
"""3 x 64: the queries that share a key, where they are all there is"""
low_narrow_tile = _make_dot_tile(3, 1, of=4)
"""3 x 16, of panels of 64"""
