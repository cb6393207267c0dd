"""CPU: flash-attention pieces of torch, merged by log-sum-exp, with an exact backward.

The prompt's keys and values are read in place by all completions at once; nothing is repeated and
no (T, T) mask exists. Each piece's backward gets the MERGED output and log-sum-exp, so it sees the
true probabilities and its gradients just add up (the algebra of ring attention).
"""

from __future__ import annotations

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)  # (T, H, D) -> (1, H, T, D), no copy


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class PrefixAttention(torch.autograd.Function):
    """q (T, Hq, D), k and v (T, Hkv, D) -> out (T, Hq, D)."""

    @staticmethod
    def forward(ctx, q, k, v, prompt_len: int, bounds: list[int], scale: float):
        qh, kh, vh = (_heads_first(x) for x in (q, k, v))
        out = q.new_empty(q.shape)
        outh = _heads_first(out)
        wide = _accumulator(q.dtype)
        lse = q.new_empty((1, q.shape[1], q.shape[0]), dtype=wide)
        causal = [(0, prompt_len), *zip(bounds, bounds[1:], strict=False)]
        for start, end in causal:
            if end > start:
                piece = slice(start, end)
                outh[:, :, piece], lse[:, :, piece] = _flash(
                    qh[:, :, piece], kh[:, :, piece], vh[:, :, piece], 0.0, True, scale=scale
                )
        if q.shape[0] > prompt_len:
            tail, head = slice(prompt_len, None), slice(0, prompt_len)
            shared, shared_lse = _flash(
                qh[:, :, tail], kh[:, :, head], vh[:, :, head], 0.0, False, scale=scale
            )
            merged = torch.logaddexp(lse[:, :, tail], shared_lse)
            own_share = (lse[:, :, tail] - merged).exp_().unsqueeze(-1)
            outh[:, :, tail] = torch.lerp(shared.to(wide), outh[:, :, tail].to(wide), own_share)
            lse[:, :, tail] = merged
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.prompt_len, ctx.causal, ctx.scale = prompt_len, causal, scale
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse = ctx.saved_tensors
        qh, kh, vh, outh, gradh = (_heads_first(x) for x in (q, k, v, out, grad_out))
        grads = [torch.zeros_like(x, dtype=_accumulator(q.dtype)) for x in (q, k, v)]
        dq, dk, dv = (_heads_first(x) for x in grads)

        def add(queries: slice, keys: slice, is_causal: bool) -> None:
            piece = _flash_backward(
                gradh[:, :, queries], qh[:, :, queries], kh[:, :, keys], vh[:, :, keys],
                outh[:, :, queries], lse[:, :, queries], 0.0, is_causal, scale=ctx.scale,
            )  # fmt: skip
            dq[:, :, queries] += piece[0]
            dk[:, :, keys] += piece[1]
            dv[:, :, keys] += piece[2]

        for start, end in ctx.causal:
            if end > start:
                add(slice(start, end), slice(start, end), True)
        if q.shape[0] > ctx.prompt_len:
            add(slice(ctx.prompt_len, None), slice(0, ctx.prompt_len), False)
        return *(g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None, None, None


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_len: int, cu_seqlens: Tensor, scale: float
) -> Tensor:
    """See `polymath_fast.kernels.prefix_attention`."""
    bounds = (prompt_len + cu_seqlens).tolist()
    return PrefixAttention.apply(q, k, v, prompt_len, bounds, scale)
