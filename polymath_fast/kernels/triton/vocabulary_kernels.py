"""Kernels of the LM head's gradient for which some columns of the vocabulary are left out.

They choose columns of D (C, V), see `gradient_kernels`, and gather them and their rows of the
weight, so that the two products stay dense. With C rows a chunk, V columns, A of them chosen, and H
hidden, in bytes of bf16:

| kernel               | reads         | writes | operations |
|----------------------|---------------|--------|------------|
| column_masses_kernel | 2 C V         | 8 V    | 4 C V, for a choice of columns |
| row_masses_kernel    | 2 C V         | 4 K C  | 3 K C V, likewise, K choices at once |
| some_columns_kernel  | 2 C V         | 2 C A  | none |
| some_rows_kernel     | 2 A H         | 2 A H  | none |
| add_rows_kernel      | 8 A H         | 4 A H  | A H |
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def column_masses_kernel(
    d_ptr,
    a_ptr,
    norms_ptr,
    live_ptr,
    peak_ptr,
    mass_ptr,
    stride_d,
    vocab,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of each column: largest |a[i] D[i]| and sum of |a[i] D[i]| norms[i], of the live rows."""
    count = tl.load(live_ptr)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocab
    peak = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        valid = row < count
        a = tl.abs(tl.load(a_ptr + row, mask=valid, other=0.0))
        norm = tl.load(norms_ptr + row, mask=valid, other=0.0)
        mask = valid[:, None] & inside[None, :]
        place = d_ptr + row.to(tl.int64)[:, None] * stride_d + column[None, :]
        d = tl.abs(tl.load(place, mask=mask, other=0.0).to(tl.float32)) * a[:, None]
        peak = tl.maximum(peak, tl.max(d, axis=0))
        mass += tl.sum(d * norm[:, None], axis=0)
    tl.store(peak_ptr + column, peak, mask=inside)
    tl.store(mass_ptr + column, mass, mask=inside)


@triton.jit(do_not_specialize=["count"])
def row_masses_kernel(
    d_ptr,
    a_ptr,
    lengths_ptr,
    live_ptr,
    out_ptr,
    stride_d,
    vocab,
    count,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out (count, K): sum over columns of |a[i] D[i]| lengths (K, V), program (rows, k).

    0 for the rows past the live ones.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kind = tl.program_id(1)
    inside_chunk = row < count
    valid = inside_chunk & (row < tl.load(live_ptr))
    total = tl.zeros([ROWS], tl.float32)
    lengths_ptr += kind.to(tl.int64) * vocab
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab
        place = d_ptr + row.to(tl.int64)[:, None] * stride_d + column[None, :]
        d = tl.load(place, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
        length = tl.load(lengths_ptr + column, mask=inside, other=0.0)
        total += tl.sum(tl.abs(d) * length[None, :], axis=1)
    a = tl.abs(tl.load(a_ptr + row, mask=valid, other=0.0))
    tl.store(out_ptr + row * tl.num_programs(1) + kind, total * a, mask=inside_chunk)


@triton.jit
def some_columns_kernel(
    d_ptr,
    columns_ptr,
    live_ptr,
    width_ptr,
    out_ptr,
    stride_d,
    stride_out,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """out[i] = D[i, columns[:width]] for the live rows i, one a program.

    Zeros in the rest of the last block of columns, and in rows up to a multiple of STEP.
    """
    row = tl.program_id(0)
    live = tl.load(live_ptr)
    width = tl.load(width_ptr)
    if row >= tl.cdiv(live, STEP) * STEP:
        return
    row_ptr = d_ptr + row.to(tl.int64) * stride_d
    place_ptr = out_ptr + row.to(tl.int64) * stride_out
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        wanted = place < tl.where(row < live, width, 0)
        column = tl.load(columns_ptr + place, mask=wanted, other=0)
        d = tl.load(row_ptr + column, mask=wanted, other=0.0)
        tl.store(place_ptr + place, d, mask=place < stride_out)


@triton.jit
def some_rows_kernel(
    x_ptr, rows_ptr, width_ptr, out_ptr, stride_x, depth, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    """out (A, depth) = x[rows[:width]], one row a program; zeros up to a multiple of STEP rows."""
    place = tl.program_id(0)
    width = tl.load(width_ptr)
    if place >= tl.cdiv(width, STEP) * STEP:
        return
    source = tl.load(rows_ptr + place) * stride_x
    read = tl.where(place < width, depth, 0)
    for start in range(0, depth, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + source + column, mask=column < read, other=0.0)
        tl.store(out_ptr + place.to(tl.int64) * depth + column, x, mask=column < depth)


@triton.jit
def add_rows_kernel(some_ptr, rows_ptr, width_ptr, out_ptr, depth, BLOCK: tl.constexpr):
    """out[rows[j]] += some[j] for j < width, one a program; both fp32 with `depth` columns."""
    place = tl.program_id(0)
    if place >= tl.load(width_ptr):
        return
    target = out_ptr + tl.load(rows_ptr + place) * depth
    source = some_ptr + place.to(tl.int64) * depth
    for start in range(0, depth, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < depth
        total = tl.load(target + column, mask=inside, other=0.0)
        total += tl.load(source + column, mask=inside, other=0.0)
        tl.store(target + column, total, mask=inside)
