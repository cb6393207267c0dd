"""Backward kernels of the LM head: all but the two matrix products.

The gradient of row i by its logits is a[i] D[i] + b[i] (one-hot of its target), D (C, V) in the
input's dtype with a zero in the target's column. The target's share, half of the gradient, is so
never rounded to that dtype. With C rows a chunk, V columns and H hidden, in bytes of bf16:

| kernel               | reads         | writes | operations |
|----------------------|---------------|--------|------------|
| bonus_kernel         | 2 C V         | 2 C V  | 6 C V      |
| scaled_rows_kernel   | 2 C H         | 2 C H  | C H        |
| hidden_rows_kernel   | 4 C H + 2 C H | 2 C H  | 3 C H, for fp32 |
| target_sums_kernel   | 2 N H + 4 N H | 4 N H  | 2 N H, once a call |
| column_sums_kernel   | 2 C V         | 4 V    | 2 C V, for a bias  |
"""

from __future__ import annotations

import triton
import triton.language as tl

from polymath_fast.kernels.triton.device import LN2


@triton.jit(do_not_specialize=["count"])
def bonus_kernel(
    d_ptr, found_ptr, g_ptr, g_entropy_ptr, unit_ptr, stride_d, vocab, count, BLOCK: tl.constexpr
):
    """One program a row: D = unnormalised p, becomes D (g + g_entropy (log p + H)) / unit.

    count: rows of `found` (4, count).
    """
    row = tl.program_id(0).to(tl.int64)
    wide = count.to(tl.int64)
    entropy = tl.load(found_ptr + row + wide)
    inverse = tl.load(found_ptr + row + 3 * wide)
    unit = tl.load(unit_ptr + row)
    g = tl.load(g_ptr + row)
    g_entropy = tl.load(g_entropy_ptr + row)
    if unit != 0:
        by_logprob = g / unit
        by_entropy = g_entropy / unit
        shift = tl.log2(inverse)
        row_ptr = d_ptr + row * stride_d
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < vocab
            e = tl.load(row_ptr + column, mask=inside, other=0.0).to(tl.float32)
            logprob = (tl.log2(tl.where(e > 0, e, 1.0)) + shift) * LN2
            d = e * (by_logprob + by_entropy * (logprob + entropy))
            tl.store(row_ptr + column, d.to(d_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scaled_rows_kernel(
    hidden_ptr, index_ptr, a_ptr, unit_ptr, out_ptr, stride_hidden, depth, BLOCK: tl.constexpr
):
    """out (C, H) = a[i] / unit * hidden[index[i]]; zeros where a[i] is 0, even if that is NaN."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(index_ptr + row)
    factor = tl.load(a_ptr + row) / tl.load(unit_ptr)
    read = tl.where(factor != 0, depth, 0)
    for start in range(0, depth, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < depth
        x = tl.load(hidden_ptr + source * stride_hidden + column, mask=column < read, other=0.0)
        out = (x.to(tl.float32) * factor).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * depth + column, out, mask=inside)


@triton.jit
def hidden_rows_kernel(
    product_ptr,
    weight_ptr,
    index_ptr,
    targets_ptr,
    a_ptr,
    b_ptr,
    out_ptr,
    stride_weight,
    stride_out,
    depth,
    BLOCK: tl.constexpr,
):
    """out[index[i]] = a[i] product[i] + b[i] weight[target of i]; product (C, H) fp32 is D W."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    a = tl.load(a_ptr + row)
    b = tl.load(b_ptr + row)
    place = out_ptr + tl.load(index_ptr + row) * stride_out
    read_product = tl.where(a != 0, depth, 0)
    read_weight = tl.where(b != 0, depth, 0)
    for start in range(0, depth, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < depth
        product = tl.load(product_ptr + row * depth + column, mask=column < read_product, other=0.0)
        w_ptrs = weight_ptr + target * stride_weight + column
        w = tl.load(w_ptrs, mask=column < read_weight, other=0.0)
        out = a * product + b * w.to(tl.float32)
        tl.store(place + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def target_sums_kernel(
    hidden_ptr,
    order_ptr,
    sorted_ptr,
    b_ptr,
    unit_ptr,
    d_weight_ptr,
    d_bias_ptr,
    stride_hidden,
    depth,
    vocab,
    count,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """d_weight[t] += sum of b[i] / unit * hidden[i] over the rows i whose target is t.

    order: rows by target, sorted: their targets. The program at the first row of a target owns that
    target, so sums run in one order and nothing is atomic.
    """
    first = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < depth
    target = tl.load(sorted_ptr + first)
    before = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1)
    if (target != before) & (target >= 0) & (target < vocab):
        total = tl.zeros([BLOCK], tl.float32)
        total_b = 0.0
        position = first
        more = target >= 0
        while more:
            places = position + tl.arange(0, ROWS)
            valid = places < count
            same = tl.load(sorted_ptr + places, mask=valid, other=-1) == target
            source = tl.load(order_ptr + places, mask=same, other=0)
            b = tl.load(b_ptr + source, mask=same, other=0.0)
            mask = (b != 0)[:, None] & inside[None, :]
            x = tl.load(
                hidden_ptr + source[:, None] * stride_hidden + column[None, :], mask=mask, other=0.0
            )
            total += tl.sum(b[:, None] * x.to(tl.float32), axis=0)
            total_b += tl.sum(b, axis=0)
            position += ROWS
            following = tl.load(sorted_ptr + position, mask=position < count, other=-1)
            more = following == target
        unit = tl.load(unit_ptr)
        place = d_weight_ptr + target * depth + column
        tl.store(place, tl.load(place, mask=inside, other=0.0) + total / unit, mask=inside)
        if BIAS and tl.program_id(1) == 0:
            tl.store(d_bias_ptr + target, tl.load(d_bias_ptr + target) + total_b / unit)


@triton.jit
def column_sums_kernel(
    d_ptr,
    a_ptr,
    unit_ptr,
    live_ptr,
    out_ptr,
    stride_d,
    vocab,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out (V,) += sum over the first `live` rows of a[i] / unit * D[i]."""
    count = tl.load(live_ptr)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocab
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        valid = row < count
        a = tl.load(a_ptr + row, mask=valid, other=0.0)
        mask = valid[:, None] & inside[None, :]
        d = tl.load(
            d_ptr + row.to(tl.int64)[:, None] * stride_d + column[None, :], mask=mask, other=0.0
        )
        total += tl.sum(a[:, None] * d.to(tl.float32), axis=0)
    before = tl.load(out_ptr + column, mask=inside, other=0.0)
    tl.store(out_ptr + column, before + total / tl.load(unit_ptr), mask=inside)
