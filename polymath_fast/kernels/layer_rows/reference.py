"""Row passes of a decoder layer in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polymath_fast.kernels.checks import working_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See `layer_rows.rms_norm`."""
    out.copy_(_normed(_wide(x), eps) * _wide(weight))


def rms_norm_gradient(
    x: Tensor, weight: Tensor, eps: float, upstream: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `layer_rows.rms_norm_gradient`."""
    d_x, d_weight = _norm_gradient(_wide(x), _wide(weight), eps, _wide(upstream))
    if residual is not None:
        d_x += _wide(residual)
    return d_x.to(x.dtype), d_weight.sum(0).to(weight.dtype)


def rotate(
    stacked: Tensor,
    counts: tuple[int, int],
    cos: Tensor,
    sin: Tensor,
    head_norms: tuple[Tensor | None, Tensor | None],
    eps: float,
    out: Tensor,
) -> None:
    """See `layer_rows.rotate`."""
    *turning, values = stacked.split([*counts, counts[1]], dim=1)
    *turned, kept = out.split([*counts, counts[1]], dim=1)
    for x, weight, into in zip(turning, head_norms, turned, strict=True):
        x = _wide(x) if weight is None else _normed(_wide(x), eps) * _wide(weight)
        low, high = x.chunk(2, -1)
        (cos_low, cos_high), (sin_low, sin_high) = _halves(cos), _halves(sin)
        into.copy_(torch.cat([low * cos_low - high * sin_low, high * cos_high + low * sin_high], 2))
    kept.copy_(values)


def rotate_gradient(
    raw: Tensor | None,
    counts: tuple[int, int],
    cos: Tensor,
    sin: Tensor,
    head_norms: tuple[Tensor | None, Tensor | None],
    eps: float,
    upstream: Sequence[Tensor],
    out: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """See `layer_rows.rotate_gradient`."""
    *turned, values = out.split([*counts, counts[1]], dim=1)
    values.copy_(upstream[2])
    d_weights: list[Tensor | None] = [None, None]
    for index, (weight, into) in enumerate(zip(head_norms, turned, strict=True)):
        low, high = _wide(upstream[index]).chunk(2, -1)
        (cos_low, cos_high), (sin_low, sin_high) = _halves(cos), _halves(sin)
        d_x = torch.cat([low * cos_low + high * sin_high, high * cos_high - low * sin_low], 2)
        if weight is not None:
            x = raw.split([*counts, counts[1]], dim=1)[index]
            d_x, d_weight = _norm_gradient(_wide(x), _wide(weight), eps, d_x)
            d_weights[index] = d_weight.sum((0, 1)).to(weight.dtype)
        into.copy_(d_x)
    return tuple(d_weights)


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """See `layer_rows.swiglu`."""
    gate, up = _wide(gate_up).chunk(2, 1)
    out.copy_(gate * gate.sigmoid() * up)


def swiglu_gradient(gate_up: Tensor, upstream: Tensor, out: Tensor) -> None:
    """See `layer_rows.swiglu_gradient`."""
    gate, up = _wide(gate_up).chunk(2, 1)
    slope, sigmoid = _wide(upstream), gate.sigmoid()
    d_gate = slope * up * sigmoid * (1 + gate * (1 - sigmoid))
    out.copy_(torch.cat([d_gate, slope * gate * sigmoid], 1))
    upstream.copy_(gate * sigmoid * up)


def _wide(x: Tensor) -> Tensor:
    return x.to(working_dtype(x.dtype))


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 1, D / 2) each, of (N, D)."""
    low, high = _wide(x)[:, None].chunk(2, -1)
    return low, high


def _normed(x: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def _norm_gradient(x: Tensor, weight: Tensor, eps: float, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., H), and of the weight from each row."""
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit = x * scale
    dot = (slope * weight * unit).mean(-1, keepdim=True)
    return scale * (slope * weight - dot * unit), slope * unit
