"""What kernels over rows of logits are made of: a row is read in tiles of (LANES, WIDTH)."""

from __future__ import annotations

import triton
import triton.language as tl

from polymath_fast.kernels.triton.device import (
    FLOOR,
    LN2,
    LOG2E,
    LOWEST,
    above_floor,
    finish_row,
)


@triton.jit
def _columns(start, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """(LANES, WIDTH) int32: each lane has neighbours, which one thread loads together."""
    return start + tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _load_tile(
    row_ptr, start, vocab, stride_v, MASKED: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr
):
    """Entries from `start` on of a row, (LANES, WIDTH) fp32, -inf past its end; their columns."""
    columns = _columns(start, LANES, WIDTH)
    pointers = row_ptr + columns.to(tl.int64) * stride_v
    if MASKED:
        z = tl.load(pointers, mask=columns < vocab, other=-float("inf"))
    else:
        z = tl.load(pointers)
    return z.to(tl.float32), columns


@triton.jit
def _accumulate(z, start, columns, target, scale, top, total, moment, TILE: tl.constexpr):
    """Online softmax sums of each lane, the target left out."""
    inside = (target >= start) & (target < start + TILE)
    if inside:
        z = tl.where(columns == target, -float("inf"), z)
    peak = tl.maximum(top, tl.max(z, axis=1) * scale)
    drop = top - peak
    factor = tl.exp2(drop)
    y = above_floor(z * scale - peak[:, None])
    e = tl.exp2(y)
    moment = (moment + total * drop) * factor + tl.sum(e * y, axis=1)
    total = total * factor + tl.sum(e, axis=1)
    return peak, total, moment


@triton.jit
def row_statistics(
    row_ptr, stride_v, vocab, target, scale, LANES: tl.constexpr, WIDTH: tl.constexpr
):
    """log-prob, entropy, 1 - p of the target, log2 of the sum over the row of 2 ** y."""
    TILE: tl.constexpr = LANES * WIDTH
    valid = (target >= 0) & (target < vocab)
    mine = tl.load(row_ptr + target * stride_v, mask=valid, other=float("nan")).to(tl.float32)
    top = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    whole = vocab // TILE * TILE
    for start in range(0, whole, TILE):
        z, columns = _load_tile(row_ptr, start, vocab, stride_v, False, LANES, WIDTH)
        top, total, moment = _accumulate(z, start, columns, target, scale, top, total, moment, TILE)
    if whole < vocab:
        z, columns = _load_tile(row_ptr, whole, vocab, stride_v, True, LANES, WIDTH)
        top, total, moment = _accumulate(z, whole, columns, target, scale, top, total, moment, TILE)
    y_target = mine * scale
    peak = tl.maximum(tl.max(top, axis=0), y_target)
    drop = tl.maximum(top - peak, FLOOR)
    factor = tl.exp2(drop)
    row_moment = tl.sum((moment + total * drop) * factor, axis=0)
    row_total = tl.sum(total * factor, axis=0)
    logprob, entropy, rest, everything = finish_row(row_total, row_moment, y_target - peak)
    # a row of nothing but -inf has no distribution
    empty = peak <= LOWEST
    logprob = tl.where(empty, float("nan"), logprob)
    entropy = tl.where(empty, float("nan"), entropy)
    return logprob, entropy, rest, peak + tl.log2(everything)


@triton.jit
def _slope_tile(
    row_ptr,
    stride_v,
    out_ptr,
    out_stride_v,
    start,
    vocab,
    target,
    mine,
    scale,
    shift,
    weight,
    bonus,
    entropy,
    live,
    MASKED: tl.constexpr,
    BONUS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Gradient of one tile of a row; zeros, without a look at the logits, where `live` is not."""
    d = tl.zeros([LANES, WIDTH], tl.float32)
    if live:
        z, columns = _load_tile(row_ptr, start, vocab, stride_v, MASKED, LANES, WIDTH)
        y = z * scale - shift
        if BONUS:
            y = above_floor(y)
            d = tl.exp2(y) * (weight - bonus * (y * LN2 + entropy))
        else:
            d = tl.exp2(y) * weight
        if (target >= start) & (target < start + LANES * WIDTH):
            d = tl.where(columns == target, mine, d)
    columns = _columns(start, LANES, WIDTH)
    pointers = out_ptr + columns.to(tl.int64) * out_stride_v
    if MASKED:
        tl.store(pointers, d.to(out_ptr.dtype.element_ty), mask=columns < vocab)
    else:
        tl.store(pointers, d.to(out_ptr.dtype.element_ty))


@triton.jit
def write_slopes(
    row_ptr,
    stride_v,
    out_ptr,
    out_stride_v,
    vocab,
    target,
    temperature,
    g,
    g_entropy,
    logprob,
    entropy,
    rest,
    shift,
    BONUS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Gradient of a row of logits, given the loss's derivatives by its log-prob and entropy."""
    TILE: tl.constexpr = LANES * WIDTH
    inverse = 1.0 / temperature
    scale = inverse * LOG2E
    weight = -g * inverse
    bonus = g_entropy * inverse
    mine = g * rest * inverse
    if BONUS:
        mine -= bonus * tl.exp(logprob) * (above_floor(logprob) + entropy)
    # a row that is no distribution has no gradient, and NaN would spread to whatever sums over rows
    live = ((weight != 0) | (bonus != 0)) & (logprob == logprob)
    whole = vocab // TILE * TILE
    for start in range(0, whole, TILE):
        _slope_tile(
            row_ptr,
            stride_v,
            out_ptr,
            out_stride_v,
            start,
            vocab,
            target,
            mine,
            scale,
            shift,
            weight,
            bonus,
            entropy,
            live,
            False,
            BONUS,
            LANES,
            WIDTH,
        )
    if whole < vocab:
        _slope_tile(
            row_ptr,
            stride_v,
            out_ptr,
            out_stride_v,
            whole,
            vocab,
            target,
            mine,
            scale,
            shift,
            weight,
            bonus,
            entropy,
            live,
            True,
            BONUS,
            LANES,
            WIDTH,
        )


@triton.jit
def store_statistics(out_ptr, row, count, logprob, entropy, rest, shift):
    wide = count.to(tl.int64)
    tl.store(out_ptr + row, logprob)
    tl.store(out_ptr + row + wide, entropy)
    tl.store(out_ptr + row + 2 * wide, rest)
    tl.store(out_ptr + row + 3 * wide, shift)
