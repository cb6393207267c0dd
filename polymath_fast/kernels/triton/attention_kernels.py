"""Forward kernel of attention over shared prompts, and what its gradient kernels share with it.

A program owns a tile of queries of one head and walks over the keys of the prompt, then over those
of the completions in the tile and, where segments form a tree, of what these continue: one online
softmax (arXiv 2205.14135), nothing to merge afterwards.
Heads of one group are neighbours in the grid, so that their keys come from the L2 cache. Scores
are in base-2 units: p = 2 ** (s - lse2), s = q k scale log2(e).

Per pair of a query and a key that it sees, and query head: 4 D operations. In bytes of b an entry:
T (2 Hq + 2 Hkv) D b + 4 T Hq, and keys again for every tile of queries, from the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from polymath_fast.kernels.triton.device import LOWEST


@triton.jit
def dot(a, b, total, WIDEN: tl.constexpr):
    """total + a b. fp32 operands are multiplied in three TF32 products, which keep their digits.

    WIDEN: for Triton's interpreter, which takes the bits of bf16 operands for integers.
    """
    if WIDEN:
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype == tl.float32:
        return tl.dot(a, b, total, input_precision="tf32x3")
    else:
        return tl.dot(a, b, total)


@triton.jit
def load_tile(ptr, start, end, row, column, stride, DEPTH: tl.constexpr, WHOLE: tl.constexpr):
    """Rows start + row, up to `end`, of a (T, DEPTH) matrix; zeros beyond. WHOLE: no row is."""
    place = ptr + start.to(tl.int64) * stride + row * stride + column
    if WHOLE:
        if column.shape[1] == DEPTH:
            return tl.load(place)
        else:
            return tl.load(place, mask=column < DEPTH, other=0.0)
    else:
        return tl.load(place, mask=(row < end - start) & (column < DEPTH), other=0.0)


@triton.jit
def key_tile(
    v, whole_shared, whole, tail, shared_low, shared_high, own_low, end, KEYS: tl.constexpr
):
    """First row, and end, of the v-th tile of keys that a tile of queries meets.

    In this order: `whole_shared` tiles of the prompt, up to `whole` those of the completion, the
    rest of the prompt (if `tail`), and the rest of the completions.
    """
    rest = v - whole
    of_prompt = (v < whole_shared) | ((rest == 0) & (tail > 0))
    in_prompt = tl.where(rest < 0, v, whole_shared)
    in_own = v - whole_shared - tl.where(rest < 0, 0, tail)
    start = tl.where(of_prompt, shared_low + in_prompt * KEYS, own_low + in_own * KEYS)
    return start, tl.where(of_prompt, shared_high, end)


@triton.jit
def tree_tiles(entry, runs_ptr, TREE: tl.constexpr):
    """How many tiles of keys a tile of queries meets above its own segment, and where they are."""
    if TREE:
        first = tl.load(entry + 7)
        return tl.load(entry + 8) - first, runs_ptr + 2 * first
    else:
        return 0, runs_ptr


@triton.jit
def tree_tile(v, runs_ptr, start, stop):
    """First row and end of the v-th of them; `start` and `stop` below 0."""
    there = v >= 0
    place = runs_ptr + 2 * v
    low, high = tl.load(place, mask=there, other=0), tl.load(place + 1, mask=there, other=0)
    return tl.where(there, low, start), tl.where(there, high, stop)


@triton.jit
def _attend(
    q, k_ptr, v_ptr, last_ptr, query, start, end, peak, total, out, stride_k, stride_v, factor,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Take a tile of keys into the running peak and total (M,) and output (M, WIDTH)."""
    key = tl.arange(0, KEYS)
    depth = tl.arange(0, WIDTH)
    k = load_tile(k_ptr, start, end, key[:, None], depth[None, :], stride_k, DEPTH, WHOLE)
    s = dot(q, k.T, tl.zeros([q.shape[0], KEYS], tl.float32), WIDEN) * factor
    if not WHOLE:
        last = tl.load(last_ptr + start + key, mask=start + key < end, other=0)
        seen = (start + key[None, :] <= query[:, None]) & (query[:, None] < last[None, :])
        s = tl.where(seen, s, -float("inf"))
    higher = tl.maximum(peak, tl.max(s, axis=1))
    p = tl.exp2(s - higher[:, None])
    shrink = tl.exp2(peak - higher)
    total = total * shrink + tl.sum(p, axis=1)
    v = load_tile(v_ptr, start, end, key[:, None], depth[None, :], stride_v, DEPTH, WHOLE)
    out = dot(p.to(v.dtype), v, out * shrink[:, None], WIDEN)
    return higher, total, out


@triton.jit(do_not_specialize=["rows", "heads", "group"])
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, last_ptr, queries_ptr, runs_ptr,
    rows, heads, group, factor,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_v, stride_v_head,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    TREE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out (rows, heads, DEPTH) and lse2 (heads, rows) of one tile of queries of one head.

    queries, runs: tables of `attention_schedule`. group: query heads that share a head of keys.
    """
    head = (tl.program_id(0) % heads).to(tl.int64)
    entry = queries_ptr + (tl.program_id(0) // heads) * 9
    first, end = tl.load(entry), tl.load(entry + 1)
    shared_low, shared_high = tl.load(entry + 2), tl.load(entry + 3)
    own_low, whole_own = tl.load(entry + 4), tl.load(entry + 5)
    shift = tl.load(entry + 6).to(tl.int64)
    q_ptr += head * stride_q_head - shift * stride_q
    out_ptr -= shift * heads * DEPTH
    lse_ptr += head * rows - shift
    k_ptr += (head // group) * stride_k_head
    v_ptr += (head // group) * stride_v_head
    row = tl.arange(0, QUERIES)
    depth = tl.arange(0, WIDTH)
    query = first + row
    q = load_tile(q_ptr, first, end, row[:, None], depth[None, :], stride_q, DEPTH, False)
    peak = tl.full([QUERIES], LOWEST, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, WIDTH], tl.float32)
    whole_shared = (shared_high - shared_low) // KEYS
    tail = tl.where(shared_low + whole_shared * KEYS < shared_high, 1, 0)
    whole = whole_shared + whole_own
    masked = tail + tl.cdiv(end - own_low - whole_own * KEYS, KEYS)
    for v in range(0, whole):
        start, stop = key_tile(
            v, whole_shared, whole, tail, shared_low, shared_high, own_low, end, KEYS
        )
        peak, total, out = _attend(
            q, k_ptr, v_ptr, last_ptr, query, start, stop, peak, total, out, stride_k, stride_v,
            factor, DEPTH, WIDTH, KEYS, True, WIDEN,
        )  # fmt: skip
    above, runs_ptr = tree_tiles(entry, runs_ptr, TREE)
    for v in range(whole, whole + masked + above):
        start, stop = key_tile(
            v, whole_shared, whole, tail, shared_low, shared_high, own_low, end, KEYS
        )
        if TREE:
            start, stop = tree_tile(v - whole - masked, runs_ptr, start, stop)
        peak, total, out = _attend(
            q, k_ptr, v_ptr, last_ptr, query, start, stop, peak, total, out, stride_k, stride_v,
            factor, DEPTH, WIDTH, KEYS, False, WIDEN,
        )  # fmt: skip
    inside = query < end
    total = tl.where(inside, total, 1.0)
    place = out_ptr + (query.to(tl.int64) * heads + head)[:, None] * DEPTH + depth[None, :]
    out = (out / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(place, out, mask=inside[:, None] & (depth[None, :] < DEPTH))
    tl.store(lse_ptr + query, peak + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=["rows", "heads"])
def delta_kernel(
    out_ptr, grad_ptr, delta_ptr, rows, heads, stride_grad, stride_grad_head,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """delta (heads, rows): dot product of each row of the output with its gradient."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    row = ((tl.program_id(0) // heads) * QUERIES + tl.arange(0, QUERIES)).to(tl.int64)
    depth = tl.arange(0, WIDTH)[None, :]
    mask = (row < rows)[:, None] & (depth < DEPTH)
    out = tl.load(out_ptr + (row * heads + head)[:, None] * DEPTH + depth, mask=mask, other=0.0)
    place = grad_ptr + (row * stride_grad + head * stride_grad_head)[:, None] + depth
    grad = tl.load(place, mask=mask, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), axis=1)
    tl.store(delta_ptr + head * rows + row, delta, mask=row < rows)
