"""Row passes of a decoder layer: RMSNorm, rotary embedding, SwiGLU, and their gradients.

What is left of a layer when its matrix products and its attention are taken away. Each pass reads
every value once, works in fp32 and rounds once. The gradients compute norms and activations again,
so that nobody has to keep them.

All take impl: "auto", "reference", "cpu" or "triton". They raise ValueError for other shapes,
dtypes, devices or strides than these: N rows, H hidden, D head size, Hq / Hkv query and key heads,
A = Hq + 2 Hkv, I width of the MLP; tensors are contiguous, on one device and of one dtype, bf16,
fp16 or fp32 (on a CPU bf16 or fp32; fp64: reference only).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polymath_fast.kernels import dispatch

__all__ = [
    "rms_norm",
    "rms_norm_gradient",
    "rotate",
    "rotate_gradient",
    "swiglu",
    "swiglu_gradient",
]

HeadNorms = tuple[Tensor | None, Tensor | None]
"""weights (D,) of the RMSNorm of each query's and of each key's head; both or none"""
_OP = "layer_rows"
_NO_CPU_FP16 = {"cpu": "float16 rows (bfloat16 and float32 work)"}


@dispatch.untraced
def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, *, impl: str = "auto") -> Tensor:
    """out (N, H) = x / sqrt(mean(x^2) + eps) * weight (H,); returns `out`.

    Source: Zhang & Sennrich, arXiv 1910.07467, equation 4.
    """
    _require("weight", weight, x.shape[1:], x)
    _require("out", out, x.shape, x)
    _chosen(x, impl).rms_norm(x, weight, eps, out)
    return out


@dispatch.untraced
def rms_norm_gradient(
    x: Tensor,
    weight: Tensor,
    eps: float,
    upstream: Tensor,
    residual: Tensor | None = None,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Gradients of x (N, H) and weight (H,), from the one of the output, `upstream` (N, H).

    `residual` (N, H) is what x has as a gradient from elsewhere, and is added. Two runs give the
    same bits.
    """
    _require("weight", weight, x.shape[1:], x)
    _require("upstream", upstream, x.shape, x)
    if residual is not None:
        _require("residual", residual, x.shape, x)
    return _chosen(x, impl).rms_norm_gradient(x, weight, eps, upstream, residual)


@dispatch.untraced
def rotate(
    stacked: Tensor,
    counts: tuple[int, int],
    cos: Tensor,
    sin: Tensor,
    head_norms: HeadNorms,
    eps: float,
    out: Tensor,
    *,
    impl: str = "auto",
) -> Tensor:
    """Queries and keys, normalised if asked and rotated, into `out`, values as they are.

    The halves of a head are the pairs that turn. Source: Su et al., arXiv 2104.09864, equation 34.

    Args:
        stacked: (N, A, D) queries, keys and values of each row.
        counts: Hq and Hkv.
        cos, sin: (N, D).
        head_norms, eps: of the RMSNorm in front of the rotation.
        out: (N, A, D); `stacked` itself where heads have no norm.
    """
    _require_heads(stacked, counts, cos, sin, head_norms)
    _require("out", out, stacked.shape, stacked)
    if head_norms[0] is not None and out.data_ptr() == stacked.data_ptr() and len(out):
        raise ValueError("out is stacked: the gradient of heads with a norm needs both")
    _chosen(stacked, impl).rotate(stacked, counts, cos, sin, head_norms, eps, out)
    return out


@dispatch.untraced
def rotate_gradient(
    raw: Tensor | None,
    counts: tuple[int, int],
    cos: Tensor,
    sin: Tensor,
    head_norms: HeadNorms,
    eps: float,
    upstream: Sequence[Tensor],
    out: Tensor,
    *,
    impl: str = "auto",
) -> HeadNorms:
    """The gradient of `rotate`'s input into `out` (N, A, D); returns those of the norms' weights.

    Args:
        raw: (N, A, D) that input; read only where heads have a norm.
        upstream: gradients of the rotated queries (N, Hq, D) and keys (N, Hkv, D), and of the
            values (N, Hkv, D).
    """
    _require_heads(out, counts, cos, sin, head_norms)
    for name, given, heads in zip("qkv", upstream, (*counts, counts[1]), strict=True):
        _require(f"the gradient of {name}", given, (len(out), heads, out.shape[2]), out)
    if head_norms[0] is not None:
        if raw is None:
            raise ValueError("raw is None: the gradient of heads with a norm needs what they were")
        _require("raw", raw, out.shape, out)
    module = _chosen(out, impl)
    return module.rotate_gradient(raw, counts, cos, sin, head_norms, eps, upstream, out)


@dispatch.untraced
def swiglu(gate_up: Tensor, out: Tensor, *, impl: str = "auto") -> Tensor:
    """out (N, I) = silu(gate) * up, of gate_up (N, 2 I); returns `out`.

    Source: Shazeer, arXiv 2002.05202, equation 6.
    """
    _require("gate_up", gate_up, (len(out), 2 * out.shape[1]), out)
    _chosen(out, impl).swiglu(gate_up, out)
    return out


@dispatch.untraced
def swiglu_gradient(gate_up: Tensor, upstream: Tensor, out: Tensor, *, impl: str = "auto") -> None:
    """The gradient of gate_up (N, 2 I) into `out`, from the one of `swiglu`'s output, `upstream`
    (N, I), which becomes that output."""
    _require("gate_up", gate_up, (len(upstream), 2 * upstream.shape[1]), upstream)
    _require("out", out, gate_up.shape, gate_up)
    _chosen(upstream, impl).swiglu_gradient(gate_up, upstream, out)


def _chosen(tensor: Tensor, impl: str):
    unable = _NO_CPU_FP16 if tensor.dtype == torch.float16 else {}
    return dispatch.resolve(_OP, tensor, impl, unable)


def _require(name: str, tensor: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """`tensor` is contiguous, of that shape, and on the device and of the dtype of `like`."""
    same = tensor.dtype == like.dtype and tensor.device == like.device
    if tuple(tensor.shape) != tuple(shape) or not same or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device} with strides "
            f"{tensor.stride()}: must be contiguous {tuple(shape)} {like.dtype} on {like.device}"
        )


def _require_heads(
    stacked: Tensor, counts: tuple[int, int], cos: Tensor, sin: Tensor, head_norms: HeadNorms
) -> None:
    rows, heads, size = stacked.shape
    queries, keys = counts
    if heads != queries + 2 * keys or size % 2:
        raise ValueError(
            f"{heads} heads of {size}: {queries} queries and {keys} keys need "
            f"{queries + 2 * keys} heads of an even size"
        )
    _require("cos", cos, (rows, size), stacked)
    _require("sin", sin, (rows, size), stacked)
    if (head_norms[0] is None) != (head_norms[1] is None):
        raise ValueError("head_norms: one of queries and keys has a norm; both do, or none")
    for name, weight in zip(("q_norm", "k_norm"), head_norms, strict=True):
        if weight is not None:
            _require(name, weight, (size,), stacked)
