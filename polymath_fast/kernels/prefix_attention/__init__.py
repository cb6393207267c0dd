"""Attention of many completions over one prompt that is computed and stored once."""

from __future__ import annotations

import torch
from torch import Tensor

from polymath_fast.kernels import dispatch


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_len: int,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Causal attention of rows packed as [prompt | completion_1 | ... | completion_B].

    The prompt attends causally to itself; completion i attends to the whole prompt and causally to
    itself, never to another completion. T = prompt_len + cu_seqlens[-1] rows.

    Args:
        q: (T, Hq, D), any of bfloat16, float16, float32, float64; strided views are fine. Or
            (T - prompt_len, Hq, D), the completions' rows alone, where the prompt's own output is
            known already.
        k: (T, Hkv, D), Hq a multiple of Hkv, same dtype and device as q.
        v: (T, Hkv, D).
        prompt_len: rows of the prompt, at least 1.
        cu_seqlens: (B + 1,) int32 on the CPU, completion offsets counted from the prompt's end;
            starts at 0, never falls; an empty completion is two equal offsets.
        scale: factor on the scores; None = 1 / sqrt(D).
        impl: "auto", "reference" or "cpu".

    Returns:
        q's shape and dtype, differentiable in q, k and v.

    Raises:
        ValueError: shapes, dtypes or offsets do not fit, or `impl` cannot run here.

    Source: the merge by log-sum-exp of FlashAttention (arXiv 2205.14135, section 3.1) applied to a
    shared prefix as in Hydragen (arXiv 2402.05099), with the exact backward of merged pieces.
    """
    _check(q, k, v, prompt_len, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    implementation = dispatch.resolve("prefix_attention", q, impl)
    missing = k.shape[0] - q.shape[0]
    if missing and not getattr(implementation, "QUERIES_OF_COMPLETIONS", False):
        # Rows nobody reads have no gradient: the price is the prompt's attention to itself.
        q = torch.cat([q.new_zeros(missing, *q.shape[1:]), q])
        return implementation.prefix_attention(q, k, v, prompt_len, cu_seqlens, scale)[missing:]
    return implementation.prefix_attention(q, k, v, prompt_len, cu_seqlens, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, prompt_len: int, cu_seqlens: Tensor) -> None:
    if q.dim() != 3 or k.shape != v.shape or k.dim() != 3 or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: want (T, Hq, D), "
            "(T, Hkv, D), (T, Hkv, D) with the same D"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if not (q.dtype == k.dtype == v.dtype) or not (q.device == k.device == v.device):
        raise ValueError(
            f"q, k, v differ: {q.dtype}/{q.device}, {k.dtype}/{k.device}, {v.dtype}/{v.device}"
        )
    offsets = cu_seqlens.tolist()
    if cu_seqlens.device.type != "cpu" or offsets[0] != 0 or offsets != sorted(offsets):
        raise ValueError(
            "cu_seqlens must lie on the CPU, start at 0 and never fall, e.g. [0, 5, 9]"
        )
    rows = prompt_len + offsets[-1]
    if prompt_len < 1 or rows != k.shape[0] or q.shape[0] not in (rows, offsets[-1]):
        raise ValueError(
            f"prompt_len {prompt_len} + {offsets[-1]} completion rows do not fit {k.shape[0]} rows "
            f"of k and {q.shape[0]} of q: k needs all of them, q all or the completions' alone"
        )
