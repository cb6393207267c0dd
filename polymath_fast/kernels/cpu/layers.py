"""Row passes of a decoder layer: RMSNorm, rotary embedding, SwiGLU, and their gradients.

Values are fp32 or the uint16 bits of bf16; arithmetic is fp32, rounded once at the end of a pass.
Only sums are left to the compiler's order. What it may fuse it fuses in one copy of a function and
not in another, and a process that compiles a kernel would round otherwise than those that load it.
Ranges are of rows. N rows, H hidden, D head size, I width of the MLP.
"""

from __future__ import annotations

import numpy as np

from polymath_fast.kernels.cpu.jit import BORROWED, INLINED, njit
from polymath_fast.kernels.cpu.scalar import exp, maximum, put, value

_FAST = {"reassoc", "nsz", "contract", "arcp"}
_LOWEST = np.float32(-80.0)  # the exponential of its opposite is still finite


@njit(**BORROWED)
def rms_norm(start, stop, x, weight, eps, out):
    """out (N, H) = x / rms(x) * weight (H,). Source: arXiv 1910.07467, equation 4."""
    for i in range(start, stop):
        _norm(x[i], weight, _inverse_rms(x[i], eps), out[i])


@njit(**BORROWED)
def rms_norm_gradient(start, stop, x, weight, eps, upstream, residual, out, slots, d_weight):
    """out (N, H) = residual (N, H) + gradient of x; d_weight[slots[start]] (H,) fp32 += its own."""
    into = d_weight[slots[start]]
    for i in range(start, stop):
        scale = _inverse_rms(x[i], eps)
        _norm_gradient(x[i], weight, scale, upstream[i], residual[i], out[i], into)


@njit()
def rotate(start, stop, stacked, heads, cos, sin, norms, eps, out):
    """Heads [0, heads) of stacked (N, all heads, D), normalised if asked, then rotated, into out,
    which may be `stacked`; the other heads are copied.

    cos, sin (N, D); norms (heads, D): weights of each head's RMSNorm, or (0, D): none. Source:
    arXiv 2104.09864, equation 34, with the halves of a head as pairs.
    """
    row = np.empty(2 * stacked.shape[2], np.float32)
    _rotate_rows(start, stop, stacked, heads, cos, sin, norms, eps, row, out)


@njit(**BORROWED)
def _rotate_rows(start, stop, stacked, heads, cos, sin, norms, eps, row, out):
    for i in range(start, stop):
        for head in range(heads):
            rotated_head(stacked[i, head], head, cos[i], sin[i], norms, eps, row, out[i, head])
        for head in range(heads, stacked.shape[1]):
            copy_row(stacked[i, head], out[i, head])


@njit(**INLINED)
def rotated_head(source, head, cos, sin, norms, eps, wide, out):
    """out (D,) = source (D,) with head `head`'s norm, if there is one, rotated; wide (2 D,) fp32 is
    scratch."""
    if norms.shape[0]:
        _norm_wide(source, norms[head], _inverse_rms(source, eps), wide)
    else:
        _widen(source, wide)
    turned = wide[source.size :]
    _rotate_row(wide, cos, sin, source.size // 2, turned)
    round_row(turned, out)


@njit()
def rotate_gradient(
    start, stop, stacked, heads, cos, sin, norms, eps, d_q, d_k, d_v, out, slots, d_norms
):
    """out (N, all heads, D): gradient of `stacked` from those of its rotated queries and keys and
    of its values; d_norms[slots[start]] (heads, D) fp32 += that of the norm's weights."""
    row = np.zeros((2, stacked.shape[2]), np.float32)
    _rotate_rows_back(
        start, stop, stacked, heads, cos, sin, norms, eps, d_q, d_k, d_v, out, slots, d_norms, row
    )


@njit(**BORROWED)
def _rotate_rows_back(
    start, stop, stacked, heads, cos, sin, norms, eps, d_q, d_k, d_v, out, slots, d_norms, rows
):
    queries, keys = d_q.shape[1], d_k.shape[1]
    size, row, nothing = stacked.shape[2], rows[0], rows[1]
    for i in range(start, stop):
        for head in range(heads):
            if head < queries:
                _rotate_back(d_q[i, head], cos[i], sin[i], size // 2, row)
            else:
                _rotate_back(d_k[i, head - queries], cos[i], sin[i], size // 2, row)
            if norms.shape[0]:
                source = stacked[i, head]
                scale = _inverse_rms(source, eps)
                into = d_norms[slots[start], head]
                _norm_gradient(source, norms[head], scale, row, nothing, out[i, head], into)
            else:
                round_row(row, out[i, head])
        for head in range(keys):
            copy_row(d_v[i, head], out[i, queries + keys + head])


@njit()
def swiglu(start, stop, gate_up, out):
    """out (N, I) = silu(gate) * up for gate_up (N, 2 I). Source: arXiv 2002.05202, equation 6."""
    _swiglu_rows(start, stop, gate_up, np.empty(out.shape[1], np.float32), out)


@njit(**BORROWED)
def _swiglu_rows(start, stop, gate_up, sigmoid, out):
    width = out.shape[1]
    for i in range(start, stop):
        _sigmoid(gate_up[i, :width], sigmoid)
        _swiglu(gate_up[i, :width], gate_up[i, width:], sigmoid, out[i])


@njit()
def swiglu_gradient(start, stop, gate_up, upstream, d_gate_up):
    """d_gate_up (N, 2 I) from upstream (N, I), which becomes what `swiglu` had put out."""
    sigmoid = np.empty(upstream.shape[1], np.float32)
    _swiglu_gradient_rows(start, stop, gate_up, sigmoid, upstream, d_gate_up)


@njit(**BORROWED)
def _swiglu_gradient_rows(start, stop, gate_up, sigmoid, upstream, d_gate_up):
    # one output a loop: a loop with three of them is too tangled for the compiler to vectorise
    width = upstream.shape[1]
    for i in range(start, stop):
        gate, up = gate_up[i, :width], gate_up[i, width:]
        _sigmoid(gate, sigmoid)
        _d_gate(gate, up, sigmoid, upstream[i], d_gate_up[i, :width])
        _swiglu(gate, upstream[i], sigmoid, d_gate_up[i, width:])
        _swiglu(gate, up, sigmoid, upstream[i])


@njit(**INLINED)
def copy_row(source, out):
    """out = source; a loop, because numba takes a second to compile each assignment of arrays."""
    for j in range(out.size):
        out[j] = source[j]


@njit(**INLINED)
def round_row(row, out):
    """out (D,) = the first D of row, fp32, rounded to the dtype of `out`."""
    for j in range(out.size):
        put(out, j, row[j])


@njit(fastmath=_FAST, **INLINED)
def _inverse_rms(row, eps):
    total = np.float32(0)
    for j in range(row.size):
        x = value(row[j])
        total += x * x
    return np.float32(1) / np.sqrt(total / np.float32(row.size) + eps)


@njit(**INLINED)
def _norm(row, weight, scale, out):
    for j in range(row.size):
        put(out, j, value(row[j]) * scale * value(weight[j]))


@njit(**INLINED)
def _norm_wide(row, weight, scale, out):
    for j in range(row.size):
        out[j] = value(row[j]) * scale * value(weight[j])


@njit(**INLINED)
def _norm_gradient(row, weight, scale, upstream, residual, out, d_weight):
    dot = _norm_dot(row, weight, scale, upstream) / np.float32(row.size)
    for j in range(row.size):
        d_weight[j] += value(upstream[j]) * (value(row[j]) * scale)
    for j in range(row.size):
        x = value(row[j]) * scale
        slope = scale * (value(upstream[j]) * value(weight[j]) - dot * x)
        put(out, j, value(residual[j]) + slope)


@njit(fastmath=_FAST, **INLINED)
def _norm_dot(row, weight, scale, upstream):
    dot = np.float32(0)
    for j in range(row.size):
        dot += value(upstream[j]) * value(weight[j]) * (value(row[j]) * scale)
    return dot


@njit(**INLINED)
def _widen(row, out):
    for j in range(row.size):
        out[j] = value(row[j])


@njit(**INLINED)
def _rotate_row(row, cos, sin, half, out):
    """out (D,) fp32; the first D of row."""
    # slices: an index that is a sum might be negative, for all the compiler knows
    first, second = row[:half], row[half : 2 * half]
    _add_products(first, cos[:half], second, sin[:half], np.float32(-1), out[:half])
    _add_products(second, cos[half:], first, sin[half:], np.float32(1), out[half:])


@njit(**INLINED)
def _rotate_back(row, cos, sin, half, out):
    first, second = row[:half], row[half:]
    _add_products(first, cos[:half], second, sin[half:], np.float32(1), out[:half])
    _add_products(second, cos[half:], first, sin[:half], np.float32(-1), out[half:])


@njit(**INLINED)
def _add_products(a, b, c, d, sign, out):
    """out = a b + sign c d."""
    for j in range(out.size):
        put(out, j, value(a[j]) * value(b[j]) + sign * (value(c[j]) * value(d[j])))


@njit(error_model="numpy", **INLINED)  # else each / is a branch
def _sigmoid(row, out):
    for j in range(row.size):
        out[j] = np.float32(1) / (np.float32(1) + exp(-maximum(value(row[j]), _LOWEST)))


@njit(**INLINED)
def _swiglu(gate, up, sigmoid, out):
    for j in range(gate.size):
        put(out, j, value(gate[j]) * sigmoid[j] * value(up[j]))


@njit(**INLINED)
def _d_gate(gate, up, sigmoid, upstream, out):
    for j in range(gate.size):
        slope = sigmoid[j] * (np.float32(1) + value(gate[j]) * (np.float32(1) - sigmoid[j]))
        put(out, j, value(upstream[j]) * value(up[j]) * slope)
