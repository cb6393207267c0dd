"""Gradient kernels of attention over shared prompts; probabilities are computed again.

Three launches: a key's gradient is summed up by programs that own keys, a query's by programs that
own queries, so nothing is atomic and two runs are equal to the bit. Keys of a prompt are seen by
every query of the block: their sum is cut into pieces, each with an fp32 slot of its own, which
`sum_slots_kernel` adds in one order.

Per pair of a query and a key that it sees, and query head: 8 D operations for keys and values, 6 D
for queries. Slots take 8 D bytes a key and piece, `attention_schedule.UNITS` pieces in all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from polymath_fast.kernels.triton.attention_kernels import (
    dot,
    key_tile,
    load_tile,
    tree_tile,
    tree_tiles,
)


@triton.jit
def _query_step(
    q, grad, lse, delta, k_ptr, v_ptr, last_ptr, query, start, end, d_q, stride_k, stride_v, factor,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """d_q (M, WIDTH) with the share of a tile of keys, without the scale."""
    key = tl.arange(0, KEYS)
    depth = tl.arange(0, WIDTH)
    zeros = tl.zeros([q.shape[0], KEYS], tl.float32)
    k = load_tile(k_ptr, start, end, key[:, None], depth[None, :], stride_k, DEPTH, WHOLE)
    v = load_tile(v_ptr, start, end, key[:, None], depth[None, :], stride_v, DEPTH, WHOLE)
    p = tl.exp2(dot(q, k.T, zeros, WIDEN) * factor - lse[:, None])
    if not WHOLE:
        last = tl.load(last_ptr + start + key, mask=start + key < end, other=0)
        seen = (start + key[None, :] <= query[:, None]) & (query[:, None] < last[None, :])
        p = tl.where(seen, p, 0.0)
    d_s = p * (dot(grad, v.T, zeros, WIDEN) - delta[:, None])
    return dot(d_s.to(k.dtype), k, d_q, WIDEN)


@triton.jit(do_not_specialize=["rows", "heads", "group"])
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, d_q_ptr, last_ptr, queries_ptr, runs_ptr,
    rows, heads, group, factor, scale,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_v, stride_v_head,
    stride_grad, stride_grad_head,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    TREE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """d_q (rows, heads, DEPTH) of one tile of queries of one head."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    entry = queries_ptr + (tl.program_id(0) // heads) * 9
    first, end = tl.load(entry), tl.load(entry + 1)
    shared_low, shared_high = tl.load(entry + 2), tl.load(entry + 3)
    own_low, whole_own = tl.load(entry + 4), tl.load(entry + 5)
    shift = tl.load(entry + 6).to(tl.int64)
    q_ptr += head * stride_q_head - shift * stride_q
    grad_ptr += head * stride_grad_head - shift * stride_grad
    d_q_ptr -= shift * heads * DEPTH
    lse_ptr += head * rows - shift
    delta_ptr += head * rows - shift
    k_ptr += (head // group) * stride_k_head
    v_ptr += (head // group) * stride_v_head
    row = tl.arange(0, QUERIES)
    depth = tl.arange(0, WIDTH)
    query = first + row
    inside = query < end
    q = load_tile(q_ptr, first, end, row[:, None], depth[None, :], stride_q, DEPTH, False)
    grad = load_tile(grad_ptr, first, end, row[:, None], depth[None, :], stride_grad, DEPTH, False)
    # rows beyond the end have no output; 2 ** (s - inf) keeps them out of sums
    lse = tl.load(lse_ptr + query, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + query, mask=inside, other=0.0)
    d_q = tl.zeros([QUERIES, WIDTH], tl.float32)
    whole_shared = (shared_high - shared_low) // KEYS
    tail = tl.where(shared_low + whole_shared * KEYS < shared_high, 1, 0)
    whole = whole_shared + whole_own
    masked = tail + tl.cdiv(end - own_low - whole_own * KEYS, KEYS)
    for t in range(0, whole):
        start, stop = key_tile(
            t, whole_shared, whole, tail, shared_low, shared_high, own_low, end, KEYS
        )
        d_q = _query_step(
            q, grad, lse, delta, k_ptr, v_ptr, last_ptr, query, start, stop, d_q,
            stride_k, stride_v, factor, DEPTH, WIDTH, KEYS, True, WIDEN,
        )  # fmt: skip
    above, runs_ptr = tree_tiles(entry, runs_ptr, TREE)
    for t in range(whole, whole + masked + above):
        start, stop = key_tile(
            t, whole_shared, whole, tail, shared_low, shared_high, own_low, end, KEYS
        )
        if TREE:
            start, stop = tree_tile(t - whole - masked, runs_ptr, start, stop)
        d_q = _query_step(
            q, grad, lse, delta, k_ptr, v_ptr, last_ptr, query, start, stop, d_q,
            stride_k, stride_v, factor, DEPTH, WIDTH, KEYS, False, WIDEN,
        )  # fmt: skip
    place = d_q_ptr + (query.to(tl.int64) * heads + head)[:, None] * DEPTH + depth[None, :]
    d_q = (d_q * scale).to(d_q_ptr.dtype.element_ty)
    tl.store(place, d_q, mask=inside[:, None] & (depth[None, :] < DEPTH))


@triton.jit
def _key_step(
    k, v, q_ptr, grad_ptr, lse_ptr, delta_ptr, key, last, start, end, d_k, d_v,
    stride_q, stride_grad, factor,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, WHOLE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """d_k, d_v (N, WIDTH) with the share of a tile of queries; d_k without the scale."""
    row = tl.arange(0, QUERIES)
    depth = tl.arange(0, WIDTH)
    query = start + row
    zeros = tl.zeros([k.shape[0], QUERIES], tl.float32)
    q = load_tile(q_ptr, start, end, row[:, None], depth[None, :], stride_q, DEPTH, WHOLE)
    if WHOLE:
        lse = tl.load(lse_ptr + query)
        delta = tl.load(delta_ptr + query)
    else:
        lse = tl.load(lse_ptr + query, mask=query < end, other=float("inf"))
        delta = tl.load(delta_ptr + query, mask=query < end, other=0.0)
    p = tl.exp2(dot(k, q.T, zeros, WIDEN) * factor - lse[None, :])
    if not WHOLE:
        seen = (key[:, None] <= query[None, :]) & (query[None, :] < last[:, None])
        p = tl.where(seen & (query[None, :] < end), p, 0.0)
    grad = load_tile(grad_ptr, start, end, row[:, None], depth[None, :], stride_grad, DEPTH, WHOLE)
    d_v = dot(p.to(grad.dtype), grad, d_v, WIDEN)
    d_s = p * (dot(v, grad.T, zeros, WIDEN) - delta[None, :])
    return dot(d_s.to(q.dtype), q, d_k, WIDEN), d_v


@triton.jit(do_not_specialize=["rows", "kv_heads", "group"])
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, d_k_ptr, d_v_ptr, slots_ptr,
    last_ptr, units_ptr, rows, kv_heads, group, factor, scale,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_v, stride_v_head,
    stride_grad, stride_grad_head,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """d_k, d_v (rows, kv_heads, DEPTH) of one tile of keys of one head, or a slot's share of them.

    units: table of `attention_schedule`. slots (slots, kv_heads, 2, KEYS, DEPTH) fp32. All query
    heads of the group are summed up here, so keys are never repeated.
    """
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    entry = units_ptr + (tl.program_id(0) // kv_heads) * 8
    first, end = tl.load(entry), tl.load(entry + 1)
    low, high = tl.load(entry + 2), tl.load(entry + 3)
    behind, whole, slot = tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6)
    shift = tl.load(entry + 7).to(tl.int64)
    k_ptr += head * stride_k_head
    v_ptr += head * stride_v_head
    q_ptr += head * group * stride_q_head - shift * stride_q
    grad_ptr += head * group * stride_grad_head - shift * stride_grad
    lse_ptr += head * group * rows - shift
    delta_ptr += head * group * rows - shift
    row = tl.arange(0, KEYS)
    depth = tl.arange(0, WIDTH)
    key = first + row
    k = load_tile(k_ptr, first, end, row[:, None], depth[None, :], stride_k, DEPTH, False)
    v = load_tile(v_ptr, first, end, row[:, None], depth[None, :], stride_v, DEPTH, False)
    d_k = tl.zeros([KEYS, WIDTH], tl.float32)
    d_v = tl.zeros([KEYS, WIDTH], tl.float32)
    middle = low + behind * QUERIES
    for t in range(0, group * whole):
        member = (t // whole).to(tl.int64)
        d_k, d_v = _key_step(
            k, v, q_ptr + member * stride_q_head, grad_ptr + member * stride_grad_head,
            lse_ptr + member * rows, delta_ptr + member * rows, key, key,
            middle + (t % whole) * QUERIES, high, d_k, d_v, stride_q, stride_grad, factor,
            DEPTH, WIDTH, QUERIES, True, WIDEN,
        )  # fmt: skip
    last = tl.load(last_ptr + key, mask=key < end, other=0)
    masked = behind + tl.cdiv(tl.maximum(high - middle - whole * QUERIES, 0), QUERIES)
    for t in range(0, group * masked):
        member = (t // masked).to(tl.int64)
        step = t % masked
        step += tl.where(step < behind, 0, whole)
        d_k, d_v = _key_step(
            k, v, q_ptr + member * stride_q_head, grad_ptr + member * stride_grad_head,
            lse_ptr + member * rows, delta_ptr + member * rows, key, last,
            low + step * QUERIES, high, d_k, d_v, stride_q, stride_grad, factor,
            DEPTH, WIDTH, QUERIES, False, WIDEN,
        )  # fmt: skip
    d_k *= scale
    inside = (depth < DEPTH)[None, :]
    if slot >= 0:
        mine = slots_ptr + (slot.to(tl.int64) * kv_heads + head) * 2 * KEYS * DEPTH
        mine += row[:, None] * DEPTH + depth[None, :]
        tl.store(mine, d_k, mask=inside)
        tl.store(mine + KEYS * DEPTH, d_v, mask=inside)
    else:
        place = (key.to(tl.int64) * kv_heads + head)[:, None] * DEPTH + depth[None, :]
        stored = inside & (key < end)[:, None]
        tl.store(d_k_ptr + place, d_k.to(d_k_ptr.dtype.element_ty), mask=stored)
        tl.store(d_v_ptr + place, d_v.to(d_v_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["kv_heads"])
def sum_slots_kernel(
    slots_ptr, sums_ptr, d_k_ptr, d_v_ptr, kv_heads,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """d_k, d_v of ROWS keys of one head: the sum of their slots, first to last."""
    parts: tl.constexpr = KEYS // ROWS
    head = ((tl.program_id(0) // parts) % kv_heads).to(tl.int64)
    entry = sums_ptr + (tl.program_id(0) // (parts * kv_heads)) * 4
    first, end = tl.load(entry), tl.load(entry + 1)
    slot, count = tl.load(entry + 2), tl.load(entry + 3)
    row = (tl.program_id(0) % parts) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, WIDTH)[None, :]
    inside = (first + row < end)[:, None] & (depth < DEPTH)
    stride = kv_heads.to(tl.int64) * 2 * KEYS * DEPTH
    place = slots_ptr + slot.to(tl.int64) * stride + head * 2 * KEYS * DEPTH
    place += row[:, None] * DEPTH + depth
    d_k = tl.zeros([ROWS, WIDTH], tl.float32)
    d_v = tl.zeros([ROWS, WIDTH], tl.float32)
    for _ in range(0, count):
        d_k += tl.load(place, mask=inside, other=0.0)
        d_v += tl.load(place + KEYS * DEPTH, mask=inside, other=0.0)
        place += stride
    out = ((first + row).to(tl.int64) * kv_heads + head)[:, None] * DEPTH + depth
    tl.store(d_k_ptr + out, d_k.to(d_k_ptr.dtype.element_ty), mask=inside)
    tl.store(d_v_ptr + out, d_v.to(d_v_ptr.dtype.element_ty), mask=inside)
