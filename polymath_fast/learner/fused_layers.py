"""Decoder layers of Llama, Qwen2 and Qwen3 models, in three steps instead of thirty.

A layer becomes [norm, q/k/v projection, rotation], attention, [output projection, norm, MLP]. The
first and the last are one autograd node each, see `layer_passes`: passes over rows are kernels,
weights that lie side by side are multiplied at once, and the backward pass computes norms and
activations again instead of keeping them. Attention stays whatever the model was loaded with, so
everything that goes through transformers' attention registry works as before.

Legend: N rows, H hidden, D head size, Hq / Hkv query and key heads.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from polymath_fast.kernels import layer_rows
from polymath_fast.kernels.autograd import first_order
from polymath_fast.kernels.dense import linear, scratch
from polymath_fast.learner import layer_passes
from polymath_fast.learner.fused_embedding import fuse_embedding
from polymath_fast.learner.layer_passes import Mlp, Projections, Rotation

_DTYPES = {
    "cpu": (torch.bfloat16, torch.float32),
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
}


def fuse(model: nn.Module, attention: Callable[..., tuple[Tensor, None]]) -> str | None:
    """Replace the forward of every decoder layer, norm and embedding of `model`, if it is of a
    known shape.

    Args:
        model: a causal language model of transformers, on a CPU or a GPU.
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
    if weight.dtype not in _DTYPES.get(weight.device.type, ()):
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
        attention = layer.self_attn
        batch, length, width = hidden_states.shape
        before, behind = Projections.of(layer), Mlp.of(layer)
        rotation = Rotation.of(position_embeddings, batch)
        q, k, v, rows = QueryKeyValue.apply(
            hidden_states.reshape(-1, width), before, rotation, *before.parameters
        )
        by_head = (x.view(batch, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        out, _ = attend(attention, *by_head, attention_mask, scaling=attention.scaling, **kwargs)
        out = out.reshape(batch * length, -1)
        rows = OutputAndMlp.apply(out, rows, behind, *behind.parameters)
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
        return layer_rows.rms_norm(x.contiguous(), weight, eps, torch.empty_like(x))

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor):
        x, weight = ctx.saved_tensors
        upstream = upstream.contiguous()
        return *layer_rows.rms_norm_gradient(x.contiguous(), weight, ctx.eps, upstream), None


class QueryKeyValue(torch.autograd.Function):
    """x (N, H) -> rotated q (N, Hq, D) and k (N, Hkv, D), v (N, Hkv, D), of its norm; and x itself.

    x goes on to the residual sum through this node, so that its two gradients meet in one pass. The
    parameters come once by name and once for autograd.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, of: Projections, rotation: Rotation, *_: Tensor | None):
        size = rotation.cos.shape[1]
        normed = layer_passes.normed(x, of.norm, of.eps)
        stacked = linear(normed, of.weights, of.biases).view(len(x), -1, size)
        normalised = of.head_norms[0] is not None
        rotated = torch.empty_like(stacked) if normalised else stacked
        layer_passes.rotate(stacked, of, rotation, rotated)
        ctx.save_for_backward(x, stacked if normalised else None, *of.parameters)
        ctx.eps, ctx.rotation = of.eps, rotation
        queries, keys = of.counts(size)
        return *rotated.split([queries, keys, keys], dim=1), x.view_as(x)

    @staticmethod
    @first_order
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor, d_residual: Tensor):
        x, raw, norm, *rest = ctx.saved_tensors
        of = Projections(norm, tuple(rest[:3]), tuple(rest[3:6]), tuple(rest[6:]), ctx.eps)
        upstream = (d_q, d_k, d_v)
        d_x, d_parameters = layer_passes.projections_gradient(
            of, ctx.rotation, x, raw, upstream, d_residual
        )
        return d_x, None, None, *d_parameters


class OutputAndMlp(torch.autograd.Function):
    """attended (N, Hq D), x (N, H) -> x + projection + MLP of the norm of both. The parameters come
    once by name and once for autograd."""

    @staticmethod
    def forward(ctx: Any, attended: Tensor, x: Tensor, of: Mlp, *_: Tensor):
        between = torch.addmm(x, attended, of.output.t())
        gate_up = linear(layer_passes.normed(between, of.norm, of.eps), (of.gate, of.up))
        active = scratch("active", (len(x), of.gate.shape[0]), x)
        layer_rows.swiglu(gate_up, active)
        ctx.save_for_backward(attended, between, gate_up, *of.parameters)
        ctx.eps = of.eps
        return torch.addmm(between, active, of.down.t())

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor):
        attended, between, gate_up, *parameters = ctx.saved_tensors
        of = Mlp(*parameters, ctx.eps)
        d_attended, d_x, d_parameters = layer_passes.mlp_gradient(
            of, attended, between, gate_up, upstream.contiguous()
        )
        return d_attended, d_x, None, *d_parameters
