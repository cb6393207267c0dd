"""CPU: compiled tiles where the processor has fast ones, see `tiles`; elsewhere flash-attention
pieces of torch, merged by log-sum-exp, with an exact backward.

The prompt's keys and values are read in place by all completions at once; nothing is repeated and
no (T, T) mask exists. Completions of like length attend to themselves in one call; a segment that
others continue is read by all of these in one call, as the prompt is. Each piece's backward gets
the MERGED output and log-sum-exp, so it sees the true probabilities and its gradients just add up
(the algebra of ring attention).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from polymath_fast.kernels.prefix_attention import tiles
from polymath_fast.kernels.prefix_attention.blocks import Block, one_by_one

Parents = tuple[int, ...]

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


@lru_cache(maxsize=16)
def _shared(prompt_len: int, bounds: tuple[int, ...], parents: Parents) -> list[tuple[int, ...]]:
    """(first key, end, first query, end): rows that are seen in full by all rows of a run."""
    reach = Block(prompt_len, bounds, parents).reach()
    spans = zip(bounds, bounds[1:], reach, strict=False)
    inner = [(start, end, end, last) for start, end, last in spans if start < end < last]
    return [(0, prompt_len, prompt_len, bounds[-1]), *inner]


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)  # (T, H, D) -> (1, H, T, D), no copy


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class PrefixAttention(torch.autograd.Function):
    """q (T, Hq, D) or, without the prompt's, (T - P, Hq, D); k, v (T, Hkv, D) -> out like q."""

    @staticmethod
    def forward(
        ctx, q, k, v, prompt_len: int, bounds: tuple[int, ...], parents: Parents, scale: float
    ):
        # torch's kernels read the numbers of a head side by side, whatever their stride says
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        wide = _accumulator(q.dtype)
        # a row that is merged more than once is rounded once all the same
        out = q.new_empty(q.shape, dtype=wide if parents else q.dtype)
        lse = q.new_empty(q.shape[:2], dtype=wide)  # like q, (., Hq)
        missing = k.shape[0] - q.shape[0]
        for rows, real in _causal_buckets(prompt_len, bounds, missing):
            own = rows - missing
            batch = (x.transpose(1, 2) for x in (q[own], k[rows], v[rows]))  # (b, H, L, D)
            piece, piece_lse = _flash(*batch, 0.0, True, scale=scale)
            out[own[real]] = piece.transpose(1, 2)[real].to(out.dtype)
            lse[own[real]] = piece_lse.transpose(1, 2)[real]
        for keys, asking in _shared_pieces(prompt_len, bounds, parents, missing):
            piece, piece_lse = _flash(
                *map(_heads_first, (q[asking], k[keys], v[keys])), 0.0, False, scale=scale
            )
            piece, piece_lse = piece[0].transpose(0, 1), piece_lse[0].transpose(0, 1)
            merged = torch.logaddexp(lse[asking], piece_lse)
            own_share = (lse[asking] - merged).exp_().unsqueeze(-1)
            total = torch.lerp(piece.to(wide), out[asking].to(wide), own_share)
            out[asking] = total.to(out.dtype)
            lse[asking] = merged
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = (prompt_len, bounds, parents), scale
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse = ctx.saved_tensors
        wide = _accumulator(q.dtype)
        grads = [torch.zeros_like(x, dtype=wide) for x in (q, k, v)]
        missing = k.shape[0] - q.shape[0]
        for rows, real in _causal_buckets(*ctx.layout[:2], missing):
            own = rows - missing
            grad = (grad_out[own] * real[:, :, None, None]).transpose(1, 2)
            taken = (q[own], k[rows], v[rows], out[own], lse[own])
            batch = (x.transpose(1, 2) for x in taken)
            pieces = _flash_backward(grad, *batch, 0.0, True, scale=ctx.scale)
            for total, piece, where in zip(grads, pieces, (own, rows, rows), strict=True):
                total[where[real]] = piece.transpose(1, 2)[real].to(wide)
        for keys, asking in _shared_pieces(*ctx.layout, missing):
            pieces = _flash_backward(
                *map(_heads_first, (grad_out[asking], q[asking], k[keys], v[keys], out[asking])),
                lse[asking].transpose(0, 1).unsqueeze(0), 0.0, False, scale=ctx.scale,
            )  # fmt: skip
            for total, piece, part in zip(grads, pieces, (asking, keys, keys), strict=True):
                total[part] += piece[0].transpose(0, 1)
        return *(g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), *[None] * 4


def _causal_buckets(
    prompt_len: int, bounds: tuple[int, ...], missing: int
) -> list[tuple[Tensor, Tensor]]:
    """Segments that attend to themselves; not the prompt, the first one, when it asks nothing."""
    return _buckets(prompt_len, bounds)[1 if missing else 0 :]


def _shared_pieces(
    prompt_len: int, bounds: tuple[int, ...], parents: Parents, missing: int
) -> Iterator[tuple[slice, slice]]:
    """Keys that a run of queries sees in full, and these queries among the rows of q."""
    for start, end, first, last in _shared(prompt_len, bounds, parents):
        if last > first:
            yield slice(start, end), slice(first - missing, last - missing)


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: tuple[Block, ...], scale: float
) -> Tensor:
    """See `polymath_fast.kernels.prefix_attention`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
        if tiles.fits(q, scale):
            return tiles.TileAttention.apply(q, k, v, block, scale)
        prompt_len, offsets, parents = block
        bounds = tuple(prompt_len + offset for offset in offsets)
        return PrefixAttention.apply(q, k, v, prompt_len, bounds, parents, scale)

    return one_by_one(attend, q, k, v, blocks)
