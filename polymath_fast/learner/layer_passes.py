"""What the fused layers of a CPU compute, forward and backward: products and passes over rows.

Norms and activations are computed again on the way back instead of being kept.

Legend: N rows, H hidden, D head size, Hq / Hkv query and key heads, I width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from polymath_fast.kernels.cpu import layers
from polymath_fast.kernels.cpu.dense import input_gradient, weight_gradients
from polymath_fast.kernels.cpu.products import bits
from polymath_fast.kernels.cpu.threads import parallel, split
from polymath_fast.kernels.cpu.workspace import buffer

_SMALL = 1 << 16
"""elements of a pass below which a second thread is not worth waking"""


class Rotation(NamedTuple):
    """The rotary embedding of N rows."""

    cos: Tensor
    """(N, D)"""
    sin: Tensor
    """(N, D)"""

    @classmethod
    def of(cls, position_embeddings: tuple[Tensor, Tensor], batch: int) -> Rotation:
        """transformers' (1 or `batch`, T, D), for batch T rows."""
        size = position_embeddings[0].shape[-1]
        return cls(*(x.expand(batch, -1, -1).reshape(-1, size) for x in position_embeddings))

    def bits(self) -> tuple[np.ndarray, np.ndarray]:
        """For a compiled pass."""
        return bits(self.cos.contiguous()), bits(self.sin.contiguous())


class Projections(NamedTuple):
    """The parameters of a layer in front of attention."""

    norm: Tensor
    weights: tuple[Tensor, Tensor, Tensor]
    biases: tuple[Tensor | None, Tensor | None, Tensor | None]
    head_norms: tuple[Tensor | None, Tensor | None]
    eps: float

    @classmethod
    def of(cls, layer: nn.Module) -> Projections:
        """Of a decoder layer of transformers."""
        attention, norm = layer.self_attn, layer.input_layernorm
        linears = (attention.q_proj, attention.k_proj, attention.v_proj)
        head_norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        return cls(
            norm.weight,
            tuple(linear.weight for linear in linears),
            tuple(linear.bias for linear in linears),
            tuple(None if each is None else each.weight for each in head_norms),
            norm.variance_epsilon,
        )

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """All of them, in the order of their gradients."""
        return (self.norm, *self.weights, *self.biases, *self.head_norms)

    def counts(self, size: int) -> list[int]:
        """Heads of queries, keys and values, of that size."""
        return [weight.shape[0] // size for weight in self.weights]

    def norms_by_head(self, size: int) -> np.ndarray:
        """(Hq + Hkv, D) weights of the norm of each head; (0, 1) where heads have none."""
        if self.head_norms[0] is None:
            return np.empty((0, 1), np.float32)
        pairs = zip(self.head_norms, self.counts(size), strict=False)
        return torch.cat([each.detach().float().expand(count, -1) for each, count in pairs]).numpy()


class Mlp(NamedTuple):
    """The parameters of a layer behind attention."""

    norm: Tensor
    output: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    eps: float

    @classmethod
    def of(cls, layer: nn.Module) -> Mlp:
        """Of a decoder layer of transformers."""
        norm, mlp = layer.post_attention_layernorm, layer.mlp
        linears = (layer.self_attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        weights = (linear.weight for linear in linears)
        return cls(norm.weight, *weights, norm.variance_epsilon)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """All of them, in the order of their gradients."""
        return self[:-1]


def rotate(stacked: Tensor, of: Projections, rotation: Rotation, out: Tensor) -> None:
    """Queries and keys of stacked (N, heads, D), with their norms, rotated into `out`, which may be
    `stacked`; values as they are."""
    size = stacked.shape[2]
    queries, keys, _ = of.counts(size)
    rows_pass(
        layers.rotate, stacked, queries + keys, *rotation.bits(), of.norms_by_head(size),
        np.float32(of.eps), bits(out),
    )  # fmt: skip


def projections_gradient(
    of: Projections,
    rotation: Rotation,
    x: Tensor,
    raw: Tensor | None,
    upstream: Sequence[Tensor],
    residual: Tensor,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Gradients of x (N, H) and of the `parameters`.

    Args:
        raw: (N, Hq + 2 Hkv, D) what was projected; None where heads have no norm.
        upstream: gradients of the rotated queries (N, Hq, D) and keys and of the values.
        residual: (N, H) gradient of x from elsewhere.
    """
    rows, size = len(x), upstream[0].shape[2]
    queries, keys, values = of.counts(size)
    slopes = buffer("stacked_gradient", (rows, queries + keys + values, size), x.dtype)
    ranges, slots = _ranges(rows, slopes.numel())
    d_norms = torch.zeros(len(ranges), queries + keys, size, dtype=torch.float32)
    parallel(
        layers.rotate_gradient, ranges, bits(slopes if raw is None else raw), queries + keys,
        *rotation.bits(), of.norms_by_head(size), np.float32(of.eps),
        *(bits(d.contiguous()) for d in upstream), bits(slopes), slots, d_norms.numpy(),
    )  # fmt: skip
    slopes = slopes.view(rows, -1)
    again = normed(x, of.norm, of.eps, buffer("normed", x.shape, x.dtype))
    d_weights = weight_gradients(slopes, again, of.weights)
    parts = slopes.split([weight.shape[0] for weight in of.weights], dim=1)
    d_biases = [
        None if bias is None else part.sum(0, dtype=torch.float32).to(x.dtype)
        for bias, part in zip(of.biases, parts, strict=True)
    ]
    d_normed = input_gradient(slopes, of.weights, "d_normed")
    d_x, d_norm = norm_gradient(x, of.norm, of.eps, d_normed, residual.contiguous())
    d_heads: list[Tensor | None] = [None, None]
    if raw is not None:
        d_heads = [part.sum(0).to(x.dtype) for part in d_norms.sum(0).split([queries, keys])]
    return d_x, (d_norm, *d_weights, *d_biases, *d_heads)


def activate(gate_up: Tensor, out: Tensor) -> Tensor:
    """out (N, I) = silu(gate) * up of gate_up (N, 2 I)."""
    rows_pass(layers.swiglu, gate_up, bits(out))
    return out


def mlp_gradient(
    of: Mlp, attended: Tensor, between: Tensor, gate_up: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Gradients of attended (N, Hq D), of x (N, H) and of the `parameters`.

    between (N, H) is x + the projection of `attended`, gate_up (N, 2 I) what its norm is projected
    to, upstream (N, H) the gradient of the layer's output.
    """
    active = input_gradient(upstream, (of.down,), "active")
    slopes = buffer("gate_up_gradient", gate_up.shape, gate_up.dtype)
    rows_pass(layers.swiglu_gradient, gate_up, bits(active), bits(slopes))
    d_down = weight_gradients(upstream, active, (of.down,))
    again = normed(between, of.norm, of.eps, buffer("normed", between.shape, between.dtype))
    d_gate_up = weight_gradients(slopes, again, (of.gate, of.up))
    d_normed = input_gradient(slopes, (of.gate, of.up), "d_normed")
    d_between, d_norm = norm_gradient(between, of.norm, of.eps, d_normed, upstream)
    d_output = weight_gradients(d_between, attended, (of.output,))
    return d_between @ of.output, d_between, (d_norm, *d_output, *d_gate_up, *d_down)


def normed(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """out (N, H) = RMSNorm of x with weight (H,)."""
    rows_pass(layers.rms_norm, x.contiguous(), bits(weight), np.float32(eps), bits(out))
    return out


def norm_gradient(
    x: Tensor, weight: Tensor, eps: float, upstream: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """residual + gradient of x (N, H), and that of the norm's weight (H,)."""
    out = torch.empty_like(x)
    ranges, slots = _ranges(len(x), x.numel())
    d_weight = torch.zeros(len(ranges), x.shape[1], dtype=torch.float32)
    parallel(
        layers.rms_norm_gradient, ranges, bits(x), bits(weight), np.float32(eps),
        bits(upstream.contiguous()), bits(residual), bits(out), slots, d_weight.numpy(),
    )  # fmt: skip
    return out, d_weight.sum(0).to(weight.dtype)


def rows_pass(kernel: Callable[..., None], x: Tensor, *args: Any) -> None:
    """kernel(start, stop, x, *args) on ranges of x's rows."""
    ranges = [(0, len(x))] if x.numel() < _SMALL else split(len(x))
    parallel(kernel, ranges, bits(x), *args)


def _ranges(rows: int, elements: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Ranges of rows for the threads, and the number of a range by its first row."""
    ranges = [(0, rows)] if elements < _SMALL else split(rows)
    slots = np.zeros(rows + 1, np.int64)
    for number, (start, _) in enumerate(ranges):
        slots[start] = number
    return ranges, slots
