"""What every implementation of a decoder layer's row passes must fulfil: autograd in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polymath_fast.kernels import layer_rows

EPS = 1e-6
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""of one result, relative; a pass rounds once"""
CANCELLED = 1e-4
"""the same of a sum over rows, at least: its terms are larger than it is"""


@dataclass(frozen=True)
class Heads:
    """Of attention."""

    queries: int
    keys: int
    size: int
    norms: bool = False

    @property
    def counts(self) -> tuple[int, int]:
        return self.queries, self.keys


def compare_norm(impl: str, rows: int, width: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """`rms_norm` and its gradient, with and without a residual."""
    draw = _drawing(dtype, device)
    x, weight, upstream, residual = (
        draw(rows, width),
        draw(width),
        draw(rows, width),
        draw(rows, width),
    )
    out = layer_rows.rms_norm(x, weight, EPS, torch.empty_like(x), impl=impl)
    wide, wide_weight = _leaves(x, weight)
    truth = _norm(wide, wide_weight)
    truth.backward(upstream.double())
    _close(out, truth)
    d_x, d_weight = layer_rows.rms_norm_gradient(x, weight, EPS, upstream, impl=impl)
    _close(d_x, wide.grad)
    _close(d_weight, wide_weight.grad, CANCELLED)
    d_x, again = layer_rows.rms_norm_gradient(x, weight, EPS, upstream, residual, impl=impl)
    _close(d_x, wide.grad + residual.double())
    assert torch.equal(again, d_weight)


def compare_rotation(
    impl: str, rows: int, heads: Heads, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """`rotate`, in place where that is allowed, and its gradient."""
    draw = _drawing(dtype, device)
    raw = draw(rows, heads.queries + 2 * heads.keys, heads.size)
    cos, sin = draw(rows, heads.size), draw(rows, heads.size)
    norms = (draw(heads.size), draw(heads.size)) if heads.norms else (None, None)
    given = (heads.counts, cos, sin, norms, EPS)
    out = layer_rows.rotate(raw, *given, torch.full_like(raw, torch.nan), impl=impl)
    wide, *wide_norms = _leaves(raw, *norms)
    truth = _rotated(wide, heads, cos.double(), sin.double(), wide_norms)
    _close(out, torch.cat(truth, 1))
    if not heads.norms:
        assert torch.equal(layer_rows.rotate(raw.clone(), *given, raw.clone(), impl=impl), out)
        in_place = raw.clone()
        assert torch.equal(layer_rows.rotate(in_place, *given, in_place, impl=impl), out)
    upstream = [draw(*part.shape) for part in truth]
    torch.autograd.backward(truth, [part.double() for part in upstream])
    found = torch.full_like(raw, torch.nan)
    kept = raw if heads.norms else None
    d_norms = layer_rows.rotate_gradient(kept, *given, upstream, found, impl=impl)
    _close(found, wide.grad)
    for d_norm, leaf in zip(d_norms, wide_norms, strict=True):
        assert (d_norm is None) == (leaf is None)
        if leaf is not None:
            _close(d_norm, leaf.grad, CANCELLED)


def compare_swiglu(
    impl: str, rows: int, width: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """`swiglu` and its gradient, also far from 0."""
    draw = _drawing(dtype, device)
    gate_up, upstream = draw(rows, 2 * width) * 4, draw(rows, width)
    gate_up[:1, :1], gate_up[:1, 1:2] = -200.0, 200.0
    out = layer_rows.swiglu(gate_up, torch.empty_like(upstream), impl=impl)
    (wide,) = _leaves(gate_up)
    gate, up = wide.chunk(2, 1)
    truth = torch.nn.functional.silu(gate) * up
    truth.backward(upstream.double())
    _close(out, truth)
    slopes, given = torch.full_like(gate_up, torch.nan), upstream.clone()
    layer_rows.swiglu_gradient(gate_up, given, slopes, impl=impl)
    _close(slopes, wide.grad)
    assert torch.equal(given, out)


def _drawing(dtype: torch.dtype, device: str):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return draw


def _leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double().clone().requires_grad_() for t in tensors]


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)


def _rotated(
    raw: Tensor, heads: Heads, cos: Tensor, sin: Tensor, norms: list[Tensor | None]
) -> list[Tensor]:
    """As transformers writes it."""
    *turning, values = raw.split([*heads.counts, heads.keys], 1)
    found = []
    for x, weight in zip(turning, norms, strict=True):
        x = x if weight is None else _norm(x, weight)
        low, high = x.chunk(2, -1)
        found.append(x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None])
    return [*found, values]


def _close(found: Tensor, truth: Tensor, least: float = 0.0) -> None:
    assert found.shape == truth.shape
    if not truth.numel():
        return
    truth = truth.detach()
    size = truth.abs()
    error = float(((found - truth).abs() / (size + size.max() / 100 + 1e-30)).max())
    assert error < max(ROUNDING[found.dtype], least), error
