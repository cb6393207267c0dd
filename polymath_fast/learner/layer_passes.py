"""What the fused layers compute, forward and backward: products and passes over rows.

Norms and activations are computed again on the way back instead of being kept.

Legend: N rows, H hidden, D head size, Hq / Hkv query and key heads, I width of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from polymath_fast.kernels import layer_rows
from polymath_fast.kernels.dense import input_gradient, scratch, weight_gradients


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
        rows = (x.expand(batch, -1, -1).reshape(-1, size) for x in position_embeddings)
        return cls(*(x.contiguous() for x in rows))


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

    def counts(self, size: int) -> tuple[int, int]:
        """Heads of queries and of keys, of that size."""
        return self.weights[0].shape[0] // size, self.weights[1].shape[0] // size


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
    counts = of.counts(stacked.shape[2])
    layer_rows.rotate(stacked, counts, *rotation, of.head_norms, of.eps, out)


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
    counts = of.counts(size)
    slopes = scratch("stacked_gradient", (rows, sum(counts) + counts[1], size), x)
    d_heads = layer_rows.rotate_gradient(
        raw, counts, *rotation, of.head_norms, of.eps, [d.contiguous() for d in upstream], slopes
    )
    slopes = slopes.view(rows, -1)
    again = normed(x, of.norm, of.eps)
    d_weights = weight_gradients(slopes, again, of.weights)
    parts = slopes.split([weight.shape[0] for weight in of.weights], dim=1)
    d_biases = [
        None if bias is None else part.sum(0, dtype=torch.float32).to(x.dtype)
        for bias, part in zip(of.biases, parts, strict=True)
    ]
    d_normed = input_gradient(slopes, of.weights, "d_normed")
    d_x, d_norm = layer_rows.rms_norm_gradient(
        x.contiguous(), of.norm, of.eps, d_normed, residual.contiguous()
    )
    return d_x, (d_norm, *d_weights, *d_biases, *d_heads)


def mlp_gradient(
    of: Mlp, attended: Tensor, between: Tensor, gate_up: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Gradients of attended (N, Hq D), of x (N, H) and of the `parameters`.

    between (N, H) is x + the projection of `attended`, gate_up (N, 2 I) what its norm is projected
    to, upstream (N, H) the gradient of the layer's output.
    """
    active = input_gradient(upstream, (of.down,), "active")
    slopes = scratch("gate_up_gradient", gate_up.shape, gate_up)
    layer_rows.swiglu_gradient(gate_up, active, slopes)
    d_down = weight_gradients(upstream, active, (of.down,))
    again = normed(between, of.norm, of.eps)
    d_gate_up = weight_gradients(slopes, again, (of.gate, of.up))
    d_normed = input_gradient(slopes, (of.gate, of.up), "d_normed")
    d_between, d_norm = layer_rows.rms_norm_gradient(between, of.norm, of.eps, d_normed, upstream)
    d_output = weight_gradients(d_between, attended, (of.output,))
    return d_between @ of.output, d_between, (d_norm, *d_output, *d_gate_up, *d_down)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(N, H) RMSNorm of x with weight (H,), in scratch memory."""
    return layer_rows.rms_norm(x.contiguous(), weight, eps, scratch("normed", x.shape, x))
