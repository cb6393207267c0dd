"""The arithmetic between the products of attention, on vectors of 16 scores.

Written as vectors: from a loop over numbers LLVM makes vectors of half a register on processors
with AVX512.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from polymath_fast.kernels.cpu.moves import LANES
from polymath_fast.kernels.cpu.panel_blocks import PANEL
from polymath_fast.kernels.cpu.scalar import emit_exp2, emit_fma, emit_maximum, filled
from polymath_fast.kernels.cpu.tiles import emit_halves

_i32, _i64 = ir.IntType(32), ir.IntType(64)
_integers = ir.VectorType(_i32, LANES)
_floats = ir.VectorType(ir.FloatType(), LANES)
_lanes = ir.Constant(_integers, list(range(LANES)))
_ROW = 4 * PANEL
"""bytes between rows of fp32 or of words"""


@intrinsic
def exponentials(typing_context, row, seen, base, last, used, factor, like, out):
    """Powers of 2 of a row's scores (used,) * factor less the largest, and what they are in all.

    Scores [0, seen) and [base, last) count; base and `used` are multiples of 32. The powers go to
    `out`, in the dtype of the array `like`, 0 for scores that do not count; row and out are
    addresses. Returns their sum and the largest, times the factor.
    """
    count, number = types.intp, types.float32
    signature = types.UniTuple(number, 2)(
        types.uintp, count, count, count, count, number, like, types.uintp
    )

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        row, seen, base, last, used, factor, _, out = args
        bounds, size = (seen, base, last), signature.args[6].dtype.bitwidth // 8
        top = cgutils.alloca_once_value(builder, filled(_floats, -math.inf))
        with cgutils.for_range_slice(builder, _i64(0), used, _i64(LANES)) as (first, _):
            scores, counted = _counted(builder, row, first, bounds)
            scores = builder.select(counted, scores, filled(_floats, -math.inf))
            builder.store(emit_maximum(builder, builder.load(top), scores), top)
        largest = builder.fmul(_reduced(builder, "fmaximum", builder.load(top)), factor)
        numbers = _spread(builder, factor), builder.fneg(_spread(builder, largest))
        total = cgutils.alloca_once_value(builder, filled(_floats, 0.0))
        with cgutils.for_range_slice(builder, _i64(0), used, _i64(2 * LANES)) as (first, _):
            both = []
            for at in (first, builder.add(first, _i64(LANES))):
                scores, counted = _counted(builder, row, at, bounds)
                powers = _emit_powers(builder, scores, *numbers, counted, 4 - size)
                builder.store(builder.fadd(builder.load(total), powers), total)
                both.append(powers)
            place = builder.add(out, builder.mul(first, _i64(size)))
            if size == 2:
                _store(builder, emit_halves(builder, *both), place)
            else:
                _emit_words(builder, both, [place, builder.add(place, _i64(4 * LANES))], None)
        found = _reduced(builder, "fadd", builder.load(total)), largest
        return context.make_tuple(builder, signature.return_type, found)

    return signature, emit


def _counted(
    builder: ir.IRBuilder, row: ir.Value, first: ir.Value, bounds: tuple[ir.Value, ...]
) -> tuple[ir.Value, ir.Value]:
    """16 scores of a row from `first` on, and which of them count."""
    seen, base, last = bounds
    end = builder.select(builder.icmp_signed("<", first, base), seen, last)
    count = builder.trunc(builder.sub(end, first), _i32)
    scores = _load(builder, builder.add(row, builder.mul(first, _i64(4))))
    return scores, builder.icmp_signed("<", _lanes, _spread(builder, count))


def _reduced(builder: ir.IRBuilder, name: str, vector: ir.Value) -> ir.Value:
    """All elements of a vector, halved again and again, by the operation `name`."""
    combine = builder.fadd if name == "fadd" else lambda x, y: emit_maximum(builder, x, y)
    width = LANES // 2
    while width:
        order = [lane ^ width for lane in range(LANES)]
        other = builder.shuffle_vector(vector, vector, ir.Constant(_integers, order))
        vector = combine(vector, other)
        width //= 2
    return builder.extract_element(vector, _i32(0))


def _emit_powers(
    builder: ir.IRBuilder,
    scores: ir.Value,
    factor: ir.Value,
    addend: ir.Value,
    counted: ir.Value,
    left_out: int,
) -> ir.Value:
    """2^(factor * score + addend), 0 where it does not count or would be below 2^-126."""
    power = emit_fma(builder, scores, factor, addend)
    there = builder.and_(counted, builder.fcmp_unordered(">=", power, filled(_floats, -126.0)))
    return builder.select(there, emit_exp2(builder, power, left_out), filled(_floats, 0.0))


@intrinsic
def pair_slopes(
    typing_context, scores, slopes, log_sums, deltas, vectors, firsts, factor, scale, probs, step,
    d_scores, panel,
):  # fmt: skip
    """Probabilities and gradients of scores of two keys, a row each, under 16 `vectors` queries.

    All but numbers are addresses: scores and slopes (gradients of the probabilities) two rows of 64
    fp32, log_sums and deltas as many fp32 as there are queries. A probability is 2^(factor * score
    - log_sum), the gradient of its score that times (scale * slope - delta); both are 0 for queries
    before `firsts`, one each key. They go to rows `step` bytes apart, those of `d_scores` also to
    rows of `panel`: words of both keys in bf16. `probs`, alone of these an array, says which dtype.
    """
    address, number = types.uintp, types.float32
    signature = types.void(
        address, address, address, address, types.intp, types.UniTuple(types.int32, 2), number,
        number, probs, types.intp, address, address,
    )  # fmt: skip

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        scores, slopes, log_sums, deltas, vectors, firsts, factor, scale, probs, *rest = args
        step, d_scores, panel = rest
        kind = signature.args[8]
        size = kind.dtype.bitwidth // 8
        data = context.make_array(kind)(context, builder, probs).data
        out = builder.ptrtoint(data, _i64), d_scores
        numbers = [_spread(builder, each) for each in (factor, scale)]
        with cgutils.for_range(builder, vectors) as loop:
            wide = builder.mul(loop.index, _i64(4 * LANES))
            column = builder.trunc(builder.mul(loop.index, _i64(LANES)), _i32)
            statistics = [_load(builder, builder.add(x, wide)) for x in (log_sums, deltas)]
            found = []
            for row in range(2):
                first = builder.sub(builder.extract_value(firsts, row), column)
                place = builder.add(wide, _i64(_ROW * row))
                inputs = [_load(builder, builder.add(x, place)) for x in (scores, slopes)]
                found.append(_emit_slopes(builder, *inputs, *statistics, *numbers, first, 4 - size))
            narrow = builder.mul(loop.index, _i64(size * LANES))
            emit_rows = _emit_halves if size == 2 else _emit_words
            panels = None, builder.add(panel, wide)
            for start, rows, packed in zip(out, zip(*found, strict=True), panels, strict=True):
                upper = builder.add(start, narrow)
                emit_rows(builder, rows, [upper, builder.add(upper, step)], packed)
        return context.get_dummy_value()

    return signature, emit


def _emit_slopes(
    builder: ir.IRBuilder,
    scores: ir.Value,
    slopes: ir.Value,
    log_sums: ir.Value,
    deltas: ir.Value,
    factor: ir.Value,
    scale: ir.Value,
    first: ir.Value,
    left_out: int,
) -> tuple[ir.Value, ir.Value]:
    seen = builder.icmp_signed(">=", _lanes, _spread(builder, first))
    p = _emit_powers(builder, scores, factor, builder.fneg(log_sums), seen, left_out)
    slope = emit_fma(builder, slopes, scale, builder.fneg(deltas))
    return p, builder.select(seen, builder.fmul(p, slope), filled(_floats, 0.0))


def _emit_words(
    builder: ir.IRBuilder, rows: tuple[ir.Value, ir.Value], places: list[ir.Value], panel: ir.Value
) -> None:
    """Both rows to places of their own and, unless it is None, one after the other to `panel`."""
    for value, place in zip(rows, places, strict=True):
        _store(builder, value, place)
    if panel is not None:
        for row, value in enumerate(rows):
            _store(builder, value, builder.add(panel, _i64(_ROW * row)))


def _emit_halves(
    builder: ir.IRBuilder, rows: tuple[ir.Value, ir.Value], places: list[ir.Value], panel: ir.Value
) -> None:
    """As `_emit_words`, in bf16, and in the panel as pairs."""
    both = emit_halves(builder, *rows)
    for row, place in enumerate(places):
        lanes = ir.Constant(_integers, [LANES * row + lane for lane in range(LANES)])
        _store(builder, builder.shuffle_vector(both, both, lanes), place)
    if panel is not None:
        order = [LANES * row + lane for lane in range(LANES) for row in range(2)]
        pairs = ir.Constant(ir.VectorType(_i32, 2 * LANES), order)
        _store(builder, builder.shuffle_vector(both, both, pairs), panel)


def _spread(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    kind = ir.VectorType(number.type, LANES)
    start = builder.insert_element(ir.Constant(kind, ir.Undefined), number, _i32(0))
    return builder.shuffle_vector(start, start, ir.Constant(_integers, [0] * LANES))


def _load(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.load(builder.inttoptr(address, _floats.as_pointer()), align=4)


def _store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=2)
