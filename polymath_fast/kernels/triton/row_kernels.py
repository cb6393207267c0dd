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

from polymath_fast.kernels.triton.device import LOG2E, note_targets
from polymath_fast.kernels.triton.row_tiles import row_statistics, store_statistics, write_slopes


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
    """One program a row; out (4, count) fp32: what `row_statistics` returns.

    index: the rows' numbers where the caller has more of them; None: their places here.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    number = row
    if index_ptr is not None:
        number = tl.load(index_ptr + row)
    note_targets(note_ptr, number, target, vocab, True)
    row_ptr = logits_ptr + row * stride_n
    logprob, entropy, rest, shift = row_statistics(
        row_ptr, stride_v, vocab, target, LOG2E / temperature, LANES, WIDTH
    )
    store_statistics(out_ptr, row, count, logprob, entropy, rest, shift)


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
    write_slopes(
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
        logprob, entropy, rest, shift = row_statistics(
            row_ptr, stride_v, vocab, target, LOG2E / temperature, LANES, WIDTH
        )
        store_statistics(found_ptr, row, count, logprob, entropy, rest, shift)
        sound = tl.abs(logprob) < float("inf")
        g = tl.where(sound, tl.load(g_ptr + row), 0.0)
        g_entropy = 0.0
        if BONUS:
            g_entropy = tl.where(sound, tl.load(g_entropy_ptr + row), 0.0)
        write_slopes(
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
