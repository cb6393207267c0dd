"""CPU: flash-attention pieces of torch, merged by log-sum-exp, with an exact backward; bf16 on
processors with AVX512-BF16 in compiled tiles, see `tiles`.

The prompt's keys and values are read in place by all completions at once; nothing is repeated and
no (T, T) mask exists. Completions of like length attend to themselves in one call. Each piece's
backward gets the MERGED output and log-sum-exp, so it sees the true probabilities and its gradients
just add up (the algebra of ring attention).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from polymath_fast.kernels.prefix_attention import tiles
from polymath_fast.kernels.prefix_attention.blocks import Block, one_by_one

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_SPREAD = 1.25  # longest over shortest completion of a bucket, beyond _SLACK rows of difference
_SLACK = 16


@lru_cache(maxsize=16)
def _buckets(prompt_len: int, bounds: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Segments of like length: (b, L) row numbers and (b, L) bool, False where a row is a filler.

    Fillers repeat a segment's last row behind its end, where causal attention hides them. The
    prompt is a bucket of its own.
    """
    spans = sorted(
        ((end - start, start) for start, end in zip(bounds, bounds[1:], strict=False)),
        reverse=True,
    )
    groups: list[list[tuple[int, int]]] = [[(prompt_len, 0)]]
    for length, start in spans:
        if length == 0:
            break
        longest = groups[-1][0][0]
        if len(groups) > 1 and longest <= _SPREAD * length + _SLACK:
            groups[-1].append((length, start))
        else:
            groups.append([(length, start)])
    buckets = []
    for group in groups:
        lengths = torch.tensor([length for length, _ in group])[:, None]
        starts = torch.tensor([start for _, start in group])[:, None]
        columns = torch.arange(group[0][0])[None]
        buckets.append((starts + torch.minimum(columns, lengths - 1), columns < lengths))
    return buckets


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)  # (T, H, D) -> (1, H, T, D), no copy


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class PrefixAttention(torch.autograd.Function):
    """q (T, Hq, D) or, without the prompt's, (T - P, Hq, D); k, v (T, Hkv, D) -> out like q."""

    @staticmethod
    def forward(ctx, q, k, v, prompt_len: int, bounds: tuple[int, ...], scale: float):
        out = q.new_empty(q.shape)
        wide = _accumulator(q.dtype)
        lse = q.new_empty(q.shape[:2], dtype=wide)  # like q, (., Hq)
        missing = k.shape[0] - q.shape[0]
        for rows, real in _causal_buckets(prompt_len, bounds, missing):
            own = rows - missing
            batch = (x.transpose(1, 2) for x in (q[own], k[rows], v[rows]))  # (b, H, L, D)
            piece, piece_lse = _flash(*batch, 0.0, True, scale=scale)
            out[own[real]] = piece.transpose(1, 2)[real]
            lse[own[real]] = piece_lse.transpose(1, 2)[real]
        tail, head = slice(prompt_len - missing, None), slice(0, prompt_len)
        if len(q[tail]):
            shared, shared_lse = _flash(
                _heads_first(q[tail]), _heads_first(k[head]), _heads_first(v[head]), 0.0, False,
                scale=scale,
            )  # fmt: skip
            shared, shared_lse = shared[0].transpose(0, 1), shared_lse[0].transpose(0, 1)
            merged = torch.logaddexp(lse[tail], shared_lse)
            own_share = (lse[tail] - merged).exp_().unsqueeze(-1)
            out[tail] = torch.lerp(shared.to(wide), out[tail].to(wide), own_share).to(q.dtype)
            lse[tail] = merged
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.prompt_len, ctx.bounds, ctx.scale = prompt_len, bounds, scale
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse = ctx.saved_tensors
        wide = _accumulator(q.dtype)
        grads = [torch.zeros_like(x, dtype=wide) for x in (q, k, v)]
        missing = k.shape[0] - q.shape[0]
        for rows, real in _causal_buckets(ctx.prompt_len, ctx.bounds, missing):
            own = rows - missing
            grad = (grad_out[own] * real[:, :, None, None]).transpose(1, 2)
            taken = (q[own], k[rows], v[rows], out[own], lse[own])
            batch = (x.transpose(1, 2) for x in taken)
            pieces = _flash_backward(grad, *batch, 0.0, True, scale=ctx.scale)
            for total, piece, where in zip(grads, pieces, (own, rows, rows), strict=True):
                total[where[real]] = piece.transpose(1, 2)[real].to(wide)
        tail, head = slice(ctx.prompt_len - missing, None), slice(0, ctx.prompt_len)
        if len(q[tail]):
            pieces = _flash_backward(
                *map(_heads_first, (grad_out[tail], q[tail], k[head], v[head], out[tail])),
                lse[tail].transpose(0, 1).unsqueeze(0), 0.0, False, scale=ctx.scale,
            )  # fmt: skip
            for total, piece, part in zip(grads, pieces, (tail, head, head), strict=True):
                total[part] += piece[0].transpose(0, 1)
        return *(g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None, None, None


def _causal_buckets(
    prompt_len: int, bounds: tuple[int, ...], missing: int
) -> list[tuple[Tensor, Tensor]]:
    """Segments that attend to themselves; not the prompt, the first one, when it asks nothing."""
    return _buckets(prompt_len, bounds)[1 if missing else 0 :]


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: tuple[Block, ...], scale: float
) -> Tensor:
    """See `polymath_fast.kernels.prefix_attention`."""
    function = tiles.TileAttention if tiles.fits(q, scale) else PrefixAttention

    def attend(
        q: Tensor, k: Tensor, v: Tensor, prompt_len: int, offsets: tuple[int, ...]
    ) -> Tensor:
        bounds = tuple(prompt_len + offset for offset in offsets)
        return function.apply(q, k, v, prompt_len, bounds, scale)

    return one_by_one(attend, q, k, v, blocks)
