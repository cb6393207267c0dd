"""Kernels over rows of logits: log-prob and entropy, and the gradient of a loss of the two.

What a row of V entries of b bytes costs:

| kernel            | bytes read | bytes written | operations |
|-------------------|------------|---------------|------------|
| statistics_kernel | V b        | 16            | 9 V        |
| slopes_kernel     | V b        | V b           | 6 V        |
| fused_kernel      | V b        | V b           | 15 V       |

fused_kernel reads V b more where a row has left the L2 cache before its second sweep. All three are
bound by memory: at most 5 operations a byte of bf16. Each lane of the tile keeps a maximum of its
own, so nothing is exchanged between threads before the row's end; only the tile that holds the
target compares columns with it.
"""

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
    note_targets,
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
def _row_statistics(
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
def _write_slopes(
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
def _store_statistics(out_ptr, row, count, logprob, entropy, rest, shift):
    wide = count.to(tl.int64)
    tl.store(out_ptr + row, logprob)
    tl.store(out_ptr + row + wide, entropy)
    tl.store(out_ptr + row + 2 * wide, rest)
    tl.store(out_ptr + row + 3 * wide, shift)


@triton.jit(do_not_specialize=["count", "temperature"])
def statistics_kernel(
    logits_ptr,
    targets_ptr,
    index_ptr,
    note_ptr,
    out_ptr,
    stride_n,
    stride_v,
    vocab,
    count,
    temperature,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a row; out (4, count) fp32: what `_row_statistics` returns.

    index: the rows' numbers where the caller has more of them; None: their places here.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    number = row
    if index_ptr is not None:
        number = tl.load(index_ptr + row)
    note_targets(note_ptr, number, target, vocab, True)
    row_ptr = logits_ptr + row * stride_n
    logprob, entropy, rest, shift = _row_statistics(
        row_ptr, stride_v, vocab, target, LOG2E / temperature, LANES, WIDTH
    )
    _store_statistics(out_ptr, row, count, logprob, entropy, rest, shift)


@triton.jit(do_not_specialize=["count", "temperature"])
def slopes_kernel(
    logits_ptr,
    targets_ptr,
    found_ptr,
    g_ptr,
    g_entropy_ptr,
    out_ptr,
    stride_n,
    stride_v,
    out_stride_n,
    out_stride_v,
    vocab,
    count,
    temperature,
    BONUS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a row. found: out of `statistics_kernel`; g, g_entropy (count,) fp32.

    out may be the logits themselves: an entry is read and written by the same thread.
    """
    row = tl.program_id(0).to(tl.int64)
    wide = count.to(tl.int64)
    target = tl.load(targets_ptr + row)
    logprob = tl.load(found_ptr + row)
    entropy = tl.load(found_ptr + row + wide)
    rest = tl.load(found_ptr + row + 2 * wide)
    shift = tl.load(found_ptr + row + 3 * wide)
    g = tl.load(g_ptr + row)
    g_entropy = 0.0
    if BONUS:
        g_entropy = tl.load(g_entropy_ptr + row)
    _write_slopes(
        logits_ptr + row * stride_n,
        stride_v,
        out_ptr + row * out_stride_n,
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
        BONUS,
        LANES,
        WIDTH,
    )


@triton.jit(do_not_specialize=["count"])
def targets_kernel(targets_ptr, note_ptr, vocab, count, BLOCK: tl.constexpr):
    """Note targets outside [0, vocab): `fused_kernel` has no registers left to do so."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    targets = tl.load(targets_ptr + rows, mask=rows < count, other=0)
    note_targets(note_ptr, rows, targets, vocab, rows < count)


@triton.jit(do_not_specialize=["count", "temperature"])
def fused_kernel(
    logits_ptr,
    targets_ptr,
    g_ptr,
    g_entropy_ptr,
    found_ptr,
    out_ptr,
    stride_n,
    stride_v,
    out_stride_n,
    out_stride_v,
    vocab,
    count,
    temperature,
    BONUS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`statistics_kernel` and `slopes_kernel` of one row after the other.

    The grid is small enough for all rows in flight to stay in the L2 cache, from which the second
    sweep then reads. A row without a finite log-prob gets no gradient.
    """
    first = tl.program_id(0)
    for turn in range(0, tl.cdiv(count - first, tl.num_programs(0))):
        row = first.to(tl.int64) + turn * tl.num_programs(0)
        target = tl.load(targets_ptr + row)
        row_ptr = logits_ptr + row * stride_n
        logprob, entropy, rest, shift = _row_statistics(
            row_ptr, stride_v, vocab, target, LOG2E / temperature, LANES, WIDTH
        )
        _store_statistics(found_ptr, row, count, logprob, entropy, rest, shift)
        sound = tl.abs(logprob) < float("inf")
        g = tl.where(sound, tl.load(g_ptr + row), 0.0)
        g_entropy = 0.0
        if BONUS:
            g_entropy = tl.where(sound, tl.load(g_entropy_ptr + row), 0.0)
        _write_slopes(
            row_ptr,
            stride_v,
            out_ptr + row * out_stride_n,
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
            BONUS,
            LANES,
            WIDTH,
        )
