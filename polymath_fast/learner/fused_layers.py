"""Decoder layers of Llama, Qwen2 and Qwen3 models on a CPU, in three steps instead of thirty.

A layer becomes [norm, q/k/v projection, rotation], attention, [output projection, norm, MLP]. The
first and the last are one autograd node each: passes over rows are compiled, weights that lie side
by side are multiplied at once, and the backward pass computes norms and activations again instead
of keeping them. Attention stays whatever the model was loaded with, so everything that goes through
transformers' attention registry works as before.

Legend: N rows, H hidden, D head size, Hq / Hkv query and key heads, I width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polymath_fast.kernels.autograd import first_order
from polymath_fast.kernels.cpu import layers
from polymath_fast.kernels.cpu.dense import input_gradient, linear, weight_gradients
from polymath_fast.kernels.cpu.products import bits
from polymath_fast.kernels.cpu.threads import parallel, split
from polymath_fast.kernels.cpu.workspace import buffer
from polymath_fast.learner.fused_embedding import fuse_embedding

_SMALL = 1 << 16
"""elements of a pass below which a second thread is not worth waking"""


def fuse(model: nn.Module, attention: Callable[..., tuple[Tensor, None]]) -> str | None:
    """Replace the forward of every decoder layer, norm and embedding of `model`, if it is of a
    known shape.

    Args:
        model: a causal language model of transformers, on the CPU, in bfloat16 or float32.
        attention: what the model's attention modules call, as transformers' registry has it.

    Returns:
        None, or the reason why the model was left as it is.
    """
    decoder = model.get_decoder()
    for layer in decoder.layers:
        reason = _unlike(layer)
        if reason is not None:
            return reason
    for layer in decoder.layers:
        layer.forward = MethodType(_layer_forward(attention), layer)
    decoder.norm.forward = MethodType(_norm_forward, decoder.norm)
    fuse_embedding(decoder.embed_tokens)
    return None


def _unlike(layer: nn.Module) -> str | None:
    attention, mlp = layer.self_attn, layer.mlp
    weight = mlp.down_proj.weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float32):
        return f"weights are {weight.dtype} on {weight.device}"
    if not isinstance(mlp.act_fn, nn.SiLU) and type(mlp.act_fn).__name__ != "SiLUActivation":
        return f"the MLP's activation is {type(mlp.act_fn).__name__}"
    biased = [mlp.gate_proj, mlp.up_proj, mlp.down_proj, attention.o_proj]
    if any(linear.bias is not None for linear in biased):
        return "projections other than q, k and v have a bias"
    return None


def _layer_forward(attend: Callable[..., tuple[Tensor, None]]) -> Callable[..., Tensor]:
    def forward(
        layer: nn.Module,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        attention, mlp = layer.self_attn, layer.mlp
        batch, length, width = hidden_states.shape
        size = attention.head_dim
        cos, sin = (x.expand(batch, -1, -1).reshape(-1, size) for x in position_embeddings)
        norm, rows = layer.input_layernorm, hidden_states.reshape(-1, width)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        q, k, v, rows = QueryKeyValue.apply(
            rows,
            norm.weight,
            norm.variance_epsilon,
            (cos, sin, size),
            *(projection.weight for projection in projections),
            *(projection.bias for projection in projections),
            *(None if each is None else each.weight for each in head_norms),
        )
        by_head = (x.view(batch, length, -1, size).transpose(1, 2) for x in (q, k, v))
        out, _ = attend(attention, *by_head, attention_mask, scaling=attention.scaling, **kwargs)
        norm = layer.post_attention_layernorm
        weights = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        rows = OutputAndMlp.apply(
            out.reshape(batch * length, -1),
            rows,
            norm.weight,
            norm.variance_epsilon,
            *(linear.weight for linear in weights),
        )
        return rows.view(batch, length, width)

    return forward


def _norm_forward(norm: nn.Module, hidden_states: Tensor) -> Tensor:
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    return Norm.apply(rows, norm.weight, norm.variance_epsilon).view_as(hidden_states)


class Norm(torch.autograd.Function):
    """x (N, H), weight (H,) -> (N, H)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _normed(x, weight, eps, torch.empty_like(x))

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor):
        x, weight = ctx.saved_tensors
        return *_norm_gradient(x, weight, ctx.eps, upstream, torch.zeros_like(x)), None


class QueryKeyValue(torch.autograd.Function):
    """x (N, H) -> rotated q (N, Hq, D) and k (N, Hkv, D), v (N, Hkv, D), of its norm; and x itself.

    x goes on to the residual sum through this node, so that its two gradients meet in one pass.
    """

    @staticmethod
    def forward(ctx: Any, x, norm, eps, rotation, wq, wk, wv, bq, bk, bv, q_norm, k_norm):
        weights, biases, size = (wq, wk, wv), (bq, bk, bv), rotation[2]
        normed = _normed(x, norm, eps, buffer("normed", x.shape, x.dtype))
        stacked = linear(normed, weights, biases).view(len(x), -1, size)
        rotated = stacked if q_norm is None else torch.empty_like(stacked)
        counts = [weight.shape[0] // size for weight in weights]
        norms = _head_norms(q_norm, k_norm, counts)
        _rows_pass(
            layers.rotate, stacked, counts[0] + counts[1], *_rotation(rotation), norms,
            np.float32(eps), bits(rotated),
        )  # fmt: skip
        raw = None if q_norm is None else stacked
        ctx.save_for_backward(x, norm, raw, q_norm, k_norm, *weights, *biases)
        ctx.eps, ctx.rotation, ctx.counts = eps, rotation, counts
        return *rotated.split(counts, dim=1), x.view_as(x)

    @staticmethod
    @first_order
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor, d_residual: Tensor):
        x, norm, raw, q_norm, k_norm, *linears = ctx.saved_tensors
        weights, biases, counts = linears[:3], linears[3:], ctx.counts
        size, rows, heads = ctx.rotation[2], len(x), counts[0] + counts[1]
        slopes = buffer("stacked_gradient", (rows, sum(counts), size), x.dtype)
        ranges, slots = _ranges(rows, slopes.numel())
        norms = _head_norms(q_norm, k_norm, counts)
        d_norms = torch.zeros(len(ranges), heads, size)
        upstream = (bits(d.contiguous()) for d in (d_q, d_k, d_v))
        parallel(
            layers.rotate_gradient, ranges, bits(slopes if raw is None else raw), heads,
            *_rotation(ctx.rotation), norms, np.float32(ctx.eps), *upstream, bits(slopes), slots,
            d_norms.numpy(),
        )  # fmt: skip
        slopes = slopes.view(rows, -1)
        normed = _normed(x, norm, ctx.eps, buffer("normed", x.shape, x.dtype))
        d_weights = weight_gradients(slopes, normed, weights)
        ends = np.cumsum([0, *(weight.shape[0] for weight in weights)])
        d_biases = [
            None if bias is None else slopes[:, start:stop].sum(0, dtype=torch.float32).to(x.dtype)
            for bias, start, stop in zip(biases, ends, ends[1:], strict=False)
        ]
        d_normed = input_gradient(slopes, weights, "d_normed")
        d_x, d_norm = _norm_gradient(x, norm, ctx.eps, d_normed, d_residual.contiguous())
        d_heads = [None, None]
        if q_norm is not None:
            d_heads = [part.sum(0).to(x.dtype) for part in d_norms.sum(0).split(counts[:2])]
        return d_x, d_norm, None, None, *d_weights, *d_biases, *d_heads


class OutputAndMlp(torch.autograd.Function):
    """attended (N, Hq D), x (N, H) -> x + projection + MLP of the norm of both."""

    @staticmethod
    def forward(ctx: Any, attended, x, norm, eps, wo, gate, up, down):
        between = torch.addmm(x, attended, wo.t())
        normed = _normed(between, norm, eps, buffer("normed", x.shape, x.dtype))
        gate_up = linear(normed, (gate, up))
        active = buffer("active", (len(x), gate.shape[0]), x.dtype)
        _rows_pass(layers.swiglu, gate_up, bits(active))
        ctx.save_for_backward(attended, between, norm, gate_up, wo, gate, up, down)
        ctx.eps = eps
        return torch.addmm(between, active, down.t())

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor):
        attended, between, norm, gate_up, wo, gate, up, down = ctx.saved_tensors
        upstream = upstream.contiguous()
        active = input_gradient(upstream, (down,), "active")
        slopes = buffer("gate_up_gradient", gate_up.shape, gate_up.dtype)
        _rows_pass(layers.swiglu_gradient, gate_up, bits(active), bits(slopes))
        d_down = weight_gradients(upstream, active, (down,))
        normed = _normed(between, norm, ctx.eps, buffer("normed", between.shape, between.dtype))
        d_gate_up = weight_gradients(slopes, normed, (gate, up))
        d_normed = input_gradient(slopes, (gate, up), "d_normed")
        d_between, d_norm = _norm_gradient(between, norm, ctx.eps, d_normed, upstream)
        d_wo = weight_gradients(d_between, attended, (wo,))
        d_attended = torch.mm(d_between, wo)
        return d_attended, d_between, d_norm, None, *d_wo, *d_gate_up, *d_down


def _normed(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    _rows_pass(layers.rms_norm, x.contiguous(), bits(weight), np.float32(eps), bits(out))
    return out


def _norm_gradient(
    x: Tensor, weight: Tensor, eps: float, upstream: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """residual + gradient of x (N, H), and that of the norm's weight (H,)."""
    out = torch.empty_like(x)
    ranges, slots = _ranges(len(x), x.numel())
    d_weight = torch.zeros(len(ranges), x.shape[1])
    parallel(
        layers.rms_norm_gradient, ranges, bits(x), bits(weight), np.float32(eps),
        bits(upstream.contiguous()), bits(residual), bits(out), slots, d_weight.numpy(),
    )  # fmt: skip
    return out, d_weight.sum(0).to(weight.dtype)


def _head_norms(q_norm: Tensor | None, k_norm: Tensor | None, counts: list[int]) -> np.ndarray:
    """(Hq + Hkv, D) weights of the norm of each head; (0, D) where heads have none."""
    if q_norm is None:
        return np.empty((0, 1), np.float32)
    rows = [q_norm.float().expand(counts[0], -1), k_norm.float().expand(counts[1], -1)]
    return torch.cat(rows).numpy()


def _rotation(rotation: tuple[Tensor, Tensor, int]) -> tuple[np.ndarray, np.ndarray]:
    return bits(rotation[0].contiguous()), bits(rotation[1].contiguous())


def _ranges(rows: int, elements: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Ranges of rows for the threads, and the number of a range by its first row."""
    ranges = [(0, rows)] if elements < _SMALL else split(rows)
    slots = np.zeros(rows + 1, np.int64)
    for number, (start, _) in enumerate(ranges):
        slots[start] = number
    return ranges, slots


def _rows_pass(kernel: Callable[..., None], x: Tensor, *args: Any) -> None:
    ranges = [(0, len(x))] if x.numel() < _SMALL else split(len(x))
    parallel(kernel, ranges, bits(x), *args)
