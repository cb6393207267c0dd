"""Scalar operations that numba lacks or widens to 64 bits; loops over them become vector code."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

LOG2_E = 1.4426950408889634
_f32, _i32 = ir.FloatType(), ir.IntType(32)
_EXP2 = (
    1.5252733804059841e-5,
    1.5403530393381609e-4,
    1.3333558146428443e-3,
    9.6181291076284772e-3,
    5.5504108664821580e-2,
    2.4022650695910072e-1,
    6.9314718055994531e-1,
    1.0,
)
"""Taylor coefficients of 2^f, highest first; for |f| <= 1/2 the first one left out is 1e-9"""


def _call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """An operation of LLVM, on numbers or on vectors of them."""
    kind = args[0].type
    name += f".v{kind.count}f32" if isinstance(kind, ir.VectorType) else ".f32"
    function = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(kind, [kind] * len(args)), name
    )
    return builder.call(function, args)


@intrinsic
def whole_vectors(typing_context):
    """Lets loops of the kernel that says so at its beginning use vectors of 512 bits where there
    are any: LLVM takes half of them on Intel's processors, whose first ones slowed down. For loops
    over long rows; short ones end in more single numbers."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        # an attribute of LLVM's that llvmlite does not list
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def exp(typing_context, value):
    """exp(x) for x <= 88, relative error 2e-7 near 0; exactly 0 below -87; NaN stays NaN."""
    return types.float32(types.float32), _emit_exp


def _emit_exp(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
    (x,) = args
    power = emit_exp2(builder, builder.fmul(x, _f32(LOG2_E)))
    tiny = builder.fcmp_ordered("<", x, _f32(-87.0))
    return builder.select(tiny, _f32(0.0), power)


def emit_exp2(builder: ir.IRBuilder, y: ir.Value, left_out: int = 0) -> ir.Value:
    """2^y for -126 <= y <= 127, a number or a vector; NaN stays NaN. left_out: of the highest terms
    of its series; with two of them the relative error is 3e-6."""
    whole = _call(builder, "llvm.rint", y)
    # exact: y and `whole` are within a factor of two, or `whole` is 0
    fraction = builder.fsub(y, whole)
    highest, *others = _EXP2[left_out:]
    power = filled(y.type, highest)
    for coefficient in others:
        power = emit_fma(builder, power, fraction, filled(y.type, coefficient))
    integers = ir.VectorType(_i32, y.type.count) if isinstance(y.type, ir.VectorType) else _i32
    exponent = builder.add(builder.fptosi(whole, integers), filled(integers, 127))
    scale = builder.bitcast(builder.shl(exponent, filled(integers, 23)), y.type)
    return builder.fmul(power, scale)


def filled(kind: ir.Type, number: float) -> ir.Constant:
    """A number, or a vector whose elements are all this one."""
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def emit_fma(builder: ir.IRBuilder, left: ir.Value, right: ir.Value, addend: ir.Value) -> ir.Value:
    """left * right + addend with one rounding, of numbers or of vectors."""
    return _call(builder, "llvm.fma", left, right, addend)


def emit_maximum(builder: ir.IRBuilder, left: ir.Value, right: ir.Value) -> ir.Value:
    """The larger of two numbers, or of each element of two vectors; NaN if either is."""
    return _call(builder, "llvm.maximum", left, right)


def emit_rounded(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    """The bits of the nearest bf16 to a number or a vector, ties to even, in 32 bits; NaN stays
    NaN."""
    vector = isinstance(number.type, ir.VectorType)
    integers = ir.VectorType(_i32, number.type.count) if vector else _i32
    bits, sixteen = builder.bitcast(number, integers), filled(integers, 16)
    odd = builder.and_(builder.lshr(bits, sixteen), filled(integers, 1))
    rounded = builder.add(builder.add(bits, filled(integers, 0x7FFF)), odd)
    is_nan = builder.fcmp_unordered("uno", number, number)
    return builder.select(is_nan, filled(integers, 0x7FC0), builder.lshr(rounded, sixteen))


@intrinsic
def maximum(typing_context, left, right):
    """The larger of two; NaN if either is."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return emit_maximum(builder, *args)

    return types.float32(types.float32, types.float32), emit


@intrinsic
def bfloat16(typing_context, value):
    """The bits of the nearest bf16, ties to even; NaN stays NaN."""
    return types.uint16(types.float32), _emit_bfloat16


def _emit_bfloat16(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
    return builder.trunc(emit_rounded(builder, args[0]), ir.IntType(16))


@intrinsic
def from_bfloat16(typing_context, bits):
    """The fp32 value of bf16 bits."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        wide = builder.shl(builder.zext(args[0], _i32), _i32(16))
        return builder.bitcast(wide, _f32)

    return types.float32(types.uint16), emit


@intrinsic
def float16(typing_context, value):
    """The bits of the nearest fp16, ties to even."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), emit


@intrinsic
def from_float16(typing_context, bits):
    """The fp32 value of fp16 bits."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), _f32)

    return types.float32(types.uint16), emit


def value(stored):
    """The fp32 value of a number that is fp32, or the bits of a bf16."""
    raise NotImplementedError("compiled code only")


@overload(value)
def _compiled_value(stored):
    if stored == types.uint16:
        return lambda stored: from_bfloat16(stored)
    return lambda stored: stored


def put(out, index, number):
    """out[index] = the fp32 `number`, as it is or rounded to the bits of a bf16."""
    raise NotImplementedError("compiled code only")


@overload(put)
def _compiled_put(out, index, number):
    if out.dtype == types.uint16:

        def put(out, index, number):
            out[index] = bfloat16(number)
    else:

        def put(out, index, number):
            out[index] = number

    return put


def load_row(source, half, scale, out):
    """out (V,) fp32 = source (V,) * scale, fp32 or bits: fp16 where `half`, else bf16."""
    raise NotImplementedError("compiled code only")


@overload(load_row)
def _compiled_load_row(source, half, scale, out):
    if source.dtype == types.uint16:

        def load(source, half, scale, out):
            if half:
                for v in range(source.size):
                    out[v] = from_float16(source[v]) * scale
            else:
                for v in range(source.size):
                    out[v] = from_bfloat16(source[v]) * scale
    else:

        def load(source, half, scale, out):
            for v in range(source.size):
                out[v] = source[v] * scale

    return load


@intrinsic
def fma(typing_context, left, right, addend):
    """left * right + addend with one rounding, in scalar and in vector code alike."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return emit_fma(builder, *args)

    return types.float32(types.float32, types.float32, types.float32), emit


@intrinsic
def upper_half(typing_context, value):
    """The bits of the nearest bf16, ties away from zero; with `lower_half` all of the value."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        bits = builder.add(builder.bitcast(args[0], _i32), _i32(0x8000))
        return builder.trunc(builder.lshr(bits, _i32(16)), ir.IntType(16))

    return types.uint16(types.float32), emit


@intrinsic
def lower_half(typing_context, value):
    """The last 16 bits: how far the value lies from `upper_half`, in units of its last place."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.trunc(builder.bitcast(args[0], _i32), ir.IntType(16))

    return types.int16(types.float32), emit


@intrinsic
def whole(typing_context, upper, lower):
    """The fp32 value of its two halves."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        high = builder.shl(builder.zext(args[0], _i32), _i32(16))
        return builder.bitcast(builder.add(high, builder.sext(args[1], _i32)), _f32)

    return types.float32(types.uint16, types.int16), emit
