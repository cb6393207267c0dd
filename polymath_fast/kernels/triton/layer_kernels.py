"""Row passes of a decoder layer: RMSNorm, rotary embedding, SwiGLU, and their gradients.

Arithmetic is fp32, rounded once at the end. Sizes of a model are compile-time constants, so that
loads stay vectors where a size is no power of two; numbers of rows are not.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A row a program."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    x = tl.load(x_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y = x * _inverse_rms(tl.sum(x * x, axis=0), WIDTH, eps) * weight
    tl.store(out_ptr + row + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def rms_norm_gradient_kernel(
    x_ptr,
    weight_ptr,
    upstream_ptr,
    residual_ptr,
    out_ptr,
    shares_ptr,
    eps,
    count,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows a program, and their share (programs, WIDTH) of the weight's gradient."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    share = tl.zeros([BLOCK], tl.float32)
    for row in range(first, tl.minimum(first + ROWS, count)):
        places = row * WIDTH + columns
        x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(upstream_ptr + places, mask=inside, other=0.0).to(tl.float32)
        scale = _inverse_rms(tl.sum(x * x, axis=0), WIDTH, eps)
        unit = x * scale
        slope = upstream * weight
        share += upstream * unit
        d_x = scale * (slope - tl.sum(slope * unit, axis=0) / WIDTH * unit)
        if RESIDUAL:
            d_x += tl.load(residual_ptr + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + places, d_x.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(shares_ptr + tl.program_id(0).to(tl.int64) * WIDTH + columns, share, mask=inside)


@triton.jit
def rotate_kernel(
    stacked_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    out_ptr,
    eps,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    NORMS: tl.constexpr,
    COPY: tl.constexpr,
):
    """A row a program: its first halves and its second halves are a tile (HEADS, HALF) each."""
    row = tl.program_id(0).to(tl.int64)
    heads, columns, places, inside = _halves(QUERIES + KEYS, HALF, HEADS, HALF_BLOCK)
    start = row * ((QUERIES + 2 * KEYS) * 2 * HALF)
    low = tl.load(stacked_ptr + start + places, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(stacked_ptr + start + places + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORMS:
        scale = _inverse_rms(tl.sum(low * low + high * high, axis=1), 2 * HALF, eps)[:, None]
        low *= scale * _by_head(q_norm_ptr, k_norm_ptr, heads, columns, QUERIES, HALF)
        high *= scale * _by_head(
            q_norm_ptr + HALF, k_norm_ptr + HALF, heads, columns, QUERIES, HALF
        )
    cos_low, cos_high = _angle(cos_ptr, row, columns, HALF)
    sin_low, sin_high = _angle(sin_ptr, row, columns, HALF)
    kind = out_ptr.dtype.element_ty
    turned = low * cos_low - high * sin_low
    tl.store(out_ptr + start + places, turned.to(kind), mask=inside)
    turned = high * cos_high + low * sin_high
    tl.store(out_ptr + start + places + HALF, turned.to(kind), mask=inside)
    if COPY:
        _, _, places, inside = _halves(KEYS, HALF, KEY_HEADS, HALF_BLOCK)
        start += (QUERIES + KEYS) * 2 * HALF
        for half in tl.static_range(2):
            values = tl.load(stacked_ptr + start + places + half * HALF, mask=inside)
            tl.store(out_ptr + start + places + half * HALF, values, mask=inside)


@triton.jit(do_not_specialize=["count"])
def rotate_gradient_kernel(
    raw_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    d_q_ptr,
    d_k_ptr,
    d_v_ptr,
    out_ptr,
    shares_ptr,
    eps,
    count,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    NORMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows a program, and their shares (programs, 2, 2 HALF) of the norms' gradients."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    heads, columns, places, inside = _halves(QUERIES + KEYS, HALF, HEADS, HALF_BLOCK)
    asks = (heads < QUERIES)[:, None] & inside
    keys = (heads >= QUERIES)[:, None] & inside
    _, _, value_places, value_inside = _halves(KEYS, HALF, KEY_HEADS, HALF_BLOCK)
    kind = out_ptr.dtype.element_ty
    if NORMS:
        low_weight = _by_head(q_norm_ptr, k_norm_ptr, heads, columns, QUERIES, HALF)
        high_weight = _by_head(q_norm_ptr + HALF, k_norm_ptr + HALF, heads, columns, QUERIES, HALF)
        low_share = tl.zeros([HEADS, HALF_BLOCK], tl.float32)
        high_share = tl.zeros([HEADS, HALF_BLOCK], tl.float32)
    for row in range(first, tl.minimum(first + ROWS, count)):
        of_q = d_q_ptr + row * (QUERIES * 2 * HALF) + places
        of_k = d_k_ptr + row * (KEYS * 2 * HALF) + places - QUERIES * 2 * HALF
        low = _either(of_q, of_k, asks, keys)
        high = _either(of_q + HALF, of_k + HALF, asks, keys)
        cos_low, cos_high = _angle(cos_ptr, row, columns, HALF)
        sin_low, sin_high = _angle(sin_ptr, row, columns, HALF)
        d_low = low * cos_low + high * sin_high
        d_high = high * cos_high - low * sin_low
        start = row * ((QUERIES + 2 * KEYS) * 2 * HALF)
        if NORMS:
            x = raw_ptr + start + places
            low = tl.load(x, mask=inside, other=0.0).to(tl.float32)
            high = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
            squares = tl.sum(low * low + high * high, axis=1)
            scale = _inverse_rms(squares, 2 * HALF, eps)[:, None]
            low *= scale
            high *= scale
            low_share += d_low * low
            high_share += d_high * high
            d_low *= low_weight
            d_high *= high_weight
            dot = (tl.sum(d_low * low + d_high * high, axis=1) / (2 * HALF))[:, None]
            d_low = scale * (d_low - dot * low)
            d_high = scale * (d_high - dot * high)
        tl.store(out_ptr + start + places, d_low.to(kind), mask=inside)
        tl.store(out_ptr + start + places + HALF, d_high.to(kind), mask=inside)
        source = d_v_ptr + row * (KEYS * 2 * HALF) + value_places
        target = out_ptr + start + (QUERIES + KEYS) * 2 * HALF + value_places
        for half in tl.static_range(2):
            values = tl.load(source + half * HALF, mask=value_inside)
            tl.store(target + half * HALF, values, mask=value_inside)
    if NORMS:
        share = shares_ptr + tl.program_id(0).to(tl.int64) * (4 * HALF) + columns
        whole = columns < HALF
        is_query = (heads < QUERIES)[:, None]
        tl.store(share, tl.sum(tl.where(is_query, low_share, 0.0), axis=0), mask=whole)
        tl.store(share + HALF, tl.sum(tl.where(is_query, high_share, 0.0), axis=0), mask=whole)
        share += 2 * HALF
        tl.store(share, tl.sum(tl.where(is_query, 0.0, low_share), axis=0), mask=whole)
        tl.store(share + HALF, tl.sum(tl.where(is_query, 0.0, high_share), axis=0), mask=whole)


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK entries of a row a program."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate = tl.load(gate_up_ptr + 2 * row + columns, mask=inside).to(tl.float32)
    up = tl.load(gate_up_ptr + 2 * row + WIDTH + columns, mask=inside).to(tl.float32)
    active = gate * _sigmoid(gate) * up
    tl.store(out_ptr + row + columns, active.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_gradient_kernel(
    gate_up_ptr, upstream_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK entries of a row a program; `upstream` becomes what the forward pass had put out."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    kind = out_ptr.dtype.element_ty
    gate = tl.load(gate_up_ptr + 2 * row + columns, mask=inside).to(tl.float32)
    up = tl.load(gate_up_ptr + 2 * row + WIDTH + columns, mask=inside).to(tl.float32)
    slope = tl.load(upstream_ptr + row + columns, mask=inside).to(tl.float32)
    sigmoid = _sigmoid(gate)
    d_gate = slope * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(out_ptr + 2 * row + columns, d_gate.to(kind), mask=inside)
    tl.store(out_ptr + 2 * row + WIDTH + columns, (slope * gate * sigmoid).to(kind), mask=inside)
    tl.store(upstream_ptr + row + columns, (gate * sigmoid * up).to(kind), mask=inside)


@triton.jit
def _inverse_rms(squares, width: tl.constexpr, eps):
    """Of the sum of `width` squares."""
    return tl.rsqrt(squares / width + eps)


@triton.jit
def _sigmoid(x):
    """0 of what lies far below 0, where the exponential is infinite."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _halves(count: tl.constexpr, half: tl.constexpr, HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr):
    """Heads, columns of a half, places of the first halves of `count` heads, and which exist."""
    heads = tl.arange(0, HEADS)
    columns = tl.arange(0, HALF_BLOCK)
    places = heads[:, None] * (2 * half) + columns[None, :]
    return heads, columns, places, (heads < count)[:, None] & (columns < half)[None, :]


@triton.jit
def _angle(pointer, row, columns, half: tl.constexpr):
    """Both halves (1, HALF) of a row of cos or sin."""
    inside = (columns < half)[None, :]
    places = pointer + row * (2 * half) + columns[None, :]
    low = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    return low, tl.load(places + half, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _by_head(q_ptr, k_ptr, heads, columns, queries: tl.constexpr, half: tl.constexpr):
    """(HEADS, HALF) the norm's weights of each head."""
    inside = columns < half
    q = tl.load(q_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return tl.where((heads < queries)[:, None], q[None, :], k[None, :])


@triton.jit
def _either(first, second, where_first, where_second):
    """fp32 values at `first` or at `second`, 0 elsewhere."""
    value = tl.load(first, mask=where_first, other=0.0).to(tl.float32)
    return value + tl.load(second, mask=where_second, other=0.0).to(tl.float32)
