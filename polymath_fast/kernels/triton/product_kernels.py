"""The two backward products of the LM head, over as many rows as the device says are live.

Launched for the largest number of rows and columns there can be; tiles past the actual ones, read
from device memory, end at once. What is left is dense: live rows are neighbours. With A live rows
(of C), V columns and H hidden, bytes of bf16:

| kernel             | operations | reads from L2, tiles of M x N    | writes |
|--------------------|------------|----------------------------------|--------|
| hidden_gemm_kernel | 2 A V H    | 2 A V H (1 / M + 1 / N) + 2 A H  | 2 A H  |
| weight_gemm_kernel | 2 A V H    | 2 A V H (1 / M + 1 / N) + 4 V H  | 4 V H  |

Sums are fp32 and run in one order; nothing is atomic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from polymath_fast.kernels.triton.head_kernels import dot, halves, tile_of


@triton.jit(do_not_specialize=["rows"])
def hidden_gemm_kernel(
    exps,
    weight,
    live_ptr,
    width_ptr,
    a_ptr,
    b_ptr,
    index_ptr,
    targets_ptr,
    head_ptr,
    out_ptr,
    rows,
    columns,
    depth,
    stride_exps,
    stride_weight,
    stride_head,
    stride_out,
    SOME: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[index[i]] = a[i] exps[i] @ weight + b[i] head[target of i], for the first `live` rows i.

    exps (rows, columns) and weight (columns, depth) are descriptors or pointers; head: all rows of
    the LM head. SOME: only the first `width` columns; nothing at all if that is 0.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), rows, depth, BLOCK_M, BLOCK_N, GROUP_M)
    live = tl.load(live_ptr)
    width = columns
    if SOME:
        width = tl.load(width_ptr)
    if (tile_m * BLOCK_M >= live) | (width == 0):
        return
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if DESCRIPTORS:
        for k in range(0, tl.cdiv(width, BLOCK_K)):
            x = exps.load([tile_m * BLOCK_M, k * BLOCK_K])
            w = weight.load([k * BLOCK_K, tile_n * BLOCK_N])
            total = dot(x, w, total, WIDEN)
    else:
        inner = tl.arange(0, BLOCK_K)
        x_ptrs = exps + (row % rows).to(tl.int64)[:, None] * stride_exps + inner[None, :]
        w_ptrs = weight + inner.to(tl.int64)[:, None] * stride_weight + (column % depth)[None, :]
        for k in range(0, tl.cdiv(width, BLOCK_K)):
            left = width - k * BLOCK_K
            x = tl.load(x_ptrs, mask=inner[None, :] < left, other=0.0)
            w = tl.load(w_ptrs, mask=inner[:, None] < left, other=0.0)
            total = dot(x, w, total, WIDEN)
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * stride_weight.to(tl.int64)
    wanted = row < live
    a = tl.load(a_ptr + row, mask=wanted, other=0.0)
    b = tl.load(b_ptr + row, mask=wanted, other=0.0)
    target = tl.load(targets_ptr + row, mask=wanted, other=0)
    index = tl.load(index_ptr + row, mask=wanted, other=0)
    left, right = halves(total)
    near = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    for half in tl.static_range(2):
        some = right if half else left
        near += half * (BLOCK_N // 2)
        inside = (near < depth)[None, :]
        mine = head_ptr + target[:, None] * stride_head + near[None, :]
        mine = tl.load(mine, mask=(b != 0)[:, None] & inside, other=0.0).to(tl.float32)
        # a row that has no gradient may hold NaN
        out = tl.where((a != 0)[:, None], a[:, None] * some, 0.0) + b[:, None] * mine
        place = out_ptr + index[:, None] * stride_out + near[None, :]
        tl.store(place, out.to(out_ptr.dtype.element_ty), mask=wanted[:, None] & inside)


@triton.jit
def weight_gemm_kernel(
    exps,
    scaled,
    live_ptr,
    width_ptr,
    out_ptr,
    columns,
    depth,
    stride_exps,
    stride_scaled,
    SOME: tl.constexpr,
    ADD: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out (columns, depth) fp32 = exps.T @ scaled, or += with ADD, over the first `live` rows.

    exps (rows, columns) and scaled (rows, depth) are descriptors or pointers, and hold zeros past
    the live rows, up to the end of a block. SOME: only the first `width` columns.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), columns, depth, BLOCK_M, BLOCK_N, GROUP_M)
    live = tl.load(live_ptr)
    width = columns
    if SOME:
        width = tl.load(width_ptr)
    if (tile_m * BLOCK_M >= width) | ((live == 0) & ADD):
        return
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if DESCRIPTORS:
        for k in range(0, tl.cdiv(live, BLOCK_K)):
            e = exps.load([k * BLOCK_K, tile_m * BLOCK_M])
            x = scaled.load([k * BLOCK_K, tile_n * BLOCK_N])
            total = dot(e.T, x, total, WIDEN)
    else:
        inner = tl.arange(0, BLOCK_K)
        e_ptrs = exps + inner.to(tl.int64)[None, :] * stride_exps + (row % columns)[:, None]
        x_ptrs = scaled + inner.to(tl.int64)[:, None] * stride_scaled + (column % depth)[None, :]
        for k in range(0, tl.cdiv(live, BLOCK_K)):
            left = live - k * BLOCK_K
            e = tl.load(e_ptrs, mask=inner[None, :] < left, other=0.0)
            x = tl.load(x_ptrs, mask=inner[:, None] < left, other=0.0)
            total = dot(e, x, total, WIDEN)
            e_ptrs += BLOCK_K * stride_exps.to(tl.int64)
            x_ptrs += BLOCK_K * stride_scaled.to(tl.int64)
    # half a tile at a time: what is added to takes as many registers as what is added
    left, right = halves(total)
    near = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    out_ptr += row.to(tl.int64)[:, None] * depth
    _store_sums(out_ptr, left, near, row < width, depth, ADD)
    _store_sums(out_ptr, right, near + BLOCK_N // 2, row < width, depth, ADD)


@triton.jit
def _store_sums(row_ptrs, total, column, wanted, depth, ADD: tl.constexpr):
    """Store `total`, or add it, at some columns of some rows."""
    place = row_ptrs + column[None, :]
    mask = wanted[:, None] & (column < depth)[None, :]
    if ADD:
        total += tl.load(place, mask=mask, other=0.0)
    tl.store(place, total, mask=mask)
