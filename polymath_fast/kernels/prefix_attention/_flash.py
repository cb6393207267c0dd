"""GPU: pieces of the flash-attn library, merged by log-sum-exp, with an exact backward.

Two kinds of calls: segments causally within themselves, and for each block its completions, as one
sequence of queries, on the prompt. The prompt is not repeated in the forward pass. Its gradient is
summed up over `copies` runs of queries, each with a copy of the prompt's keys: where sequences
times heads are fewer than multiprocessors, the library's deterministic backward takes scratch
memory for several gradients of all queries, and has work for a few programs only. Each piece's
backward gets the MERGED output and log-sum-exp, as in the CPU implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from flash_attn import flash_attn_interface as flash
from torch import Tensor

from polymath_fast.kernels.autograd import first_order
from polymath_fast.kernels.prefix_attention.blocks import Block
from polymath_fast.kernels.transfer import stream_of

_WIDEST = 256
_PROGRAMS = 160
"""wanted in a backward pass; the largest GPUs have 132 to 160 multiprocessors"""


@dataclass(frozen=True)
class _Piece:
    """One call: sequences of queries on sequences of keys."""

    queries: slice
    keys: slice
    query_bounds: Tensor  # (sequences + 1,) int32
    key_bounds: Tensor
    longest_query: int
    longest_key: int


@dataclass(frozen=True)
class _Shared:
    """Completions of a block on its prompt: `forward` in one sequence, `backward` in `copies`."""

    forward: _Piece
    backward: _Piece
    copies: int


@dataclass(frozen=True)
class _Layout:
    own: tuple[_Piece, ...]
    shared: tuple[_Shared, ...]


@lru_cache(maxsize=16)
def _layout(
    blocks: tuple[Block, ...], prompts_ask: bool, heads: int, device: torch.device, stream: int
) -> _Layout:
    """Offsets on the device, for work of one stream. Empty segments are left out."""

    def piece(
        queries: slice, keys: slice, query_bounds: list[int], key_bounds: list[int]
    ) -> _Piece:
        longest = [
            max(high - low for low, high in zip(bounds, bounds[1:], strict=False))
            for bounds in (query_bounds, key_bounds)
        ]
        sent = (
            torch.tensor(bounds, dtype=torch.int32, pin_memory=device.type == "cuda")
            for bounds in (query_bounds, key_bounds)
        )
        moved = (bounds.to(device, non_blocking=True) for bounds in sent)
        return _Piece(queries, keys, *moved, *longest)

    own, shared, everything = [], [], [0]
    start = query = 0
    for prompt_len, offsets, _ in blocks:
        middle, count = start + prompt_len, offsets[-1]
        query += prompt_len if prompts_ask else 0
        prompt, asking = slice(start, middle), slice(query, query + count)
        ends = sorted(set(offsets))
        everything += [middle + end for end in ends]
        if count:
            if not prompts_ask:
                own.append(piece(asking, slice(middle, middle + count), ends, ends))
            copies = min(-(-_PROGRAMS // heads), count)
            runs = [*range(0, count, -(-count // copies)), count]
            copied = [i * prompt_len for i in range(len(runs))]
            shared.append(
                _Shared(
                    piece(asking, prompt, [0, count], [0, prompt_len]),
                    piece(asking, prompt, runs, copied),
                    len(runs) - 1,
                )
            )
        start, query = middle + count, query + count
    if prompts_ask:
        own.append(piece(slice(0, start), slice(0, start), everything, everything))
    return _Layout(tuple(own), tuple(shared))


class PrefixAttention(torch.autograd.Function):
    """q (T, Hq, D), or its rows of completions, and k, v (T, Hkv, D) -> out like q."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: _Layout, scale: float):
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[1], q.shape[0], device=q.device, dtype=torch.float32)
        for piece in layout.own:
            rows = piece.queries
            out[rows], lse[:, rows] = _forward(piece, q, k, v, scale, causal=True)
        for part in layout.shared:
            rows = part.forward.queries
            shared, shared_lse = _forward(part.forward, q, k, v, scale, causal=False)
            merged = torch.logaddexp(lse[:, rows], shared_lse)
            own_share = (lse[:, rows] - merged).exp_().T.unsqueeze(-1)
            out[rows] = torch.lerp(shared.float(), out[rows].float(), own_share).to(q.dtype)
            lse[:, rows] = merged
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor):
        saved, scale = (grad, *ctx.saved_tensors), ctx.scale
        gradients = tuple(
            torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in ctx.saved_tensors[:3]
        )
        for piece in ctx.layout.own:
            found = _backward(piece, saved, 1, scale, causal=True)
            for total, part, rows in zip(gradients, found, _rows(piece), strict=True):
                total[rows] = part
        for shared in ctx.layout.shared:
            piece = shared.backward
            found = _backward(piece, saved, shared.copies, scale, causal=False)
            for total, part, rows in zip(gradients, found, _rows(piece), strict=True):
                several = part.view(-1, *total[rows].shape).sum(0, dtype=torch.float32)
                total[rows] = (total[rows] + several).to(total.dtype)
        return *gradients, None, None


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: tuple[Block, ...], scale: float
) -> Tensor:
    """See `polymath_fast.kernels.prefix_attention`."""
    depth = q.shape[2]
    if depth > _WIDEST or depth % 8:
        raise ValueError(
            f"head_dim {depth}: flash-attn takes multiples of 8 up to {_WIDEST}; use impl='triton'"
        )
    layout = _layout(blocks, len(q) == len(k), q.shape[1], q.device, stream_of(q.device))
    return PrefixAttention.apply(q, k, v, layout, scale)


def _rows(piece: _Piece) -> tuple[slice, slice, slice]:
    """Of q, k and v."""
    return piece.queries, piece.keys, piece.keys


def _forward(
    piece: _Piece, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (Hq, rows)."""
    # two at least: for one query a sequence the library may return another layout
    out, lse, *_ = flash._flash_attn_varlen_forward(
        q[piece.queries], k[piece.keys], v[piece.keys], piece.query_bounds, piece.key_bounds,
        max(piece.longest_query, 2), piece.longest_key,
        dropout_p=0.0, softmax_scale=scale, causal=causal,
    )  # fmt: skip
    return out, lse


def _backward(
    piece: _Piece, saved: tuple[Tensor, ...], copies: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; keys are repeated `copies` times, and so are their gradients."""
    grad, q, k, v, out, lse = saved
    rows = piece.queries
    q, k, v = (x[part] for x, part in zip((q, k, v), _rows(piece), strict=True))
    if copies > 1:
        k, v = (x.repeat(copies, 1, 1) for x in (k, v))
    found = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    flash._flash_attn_varlen_backward(
        grad[rows], q, k, v, out[rows], lse[:, rows].contiguous(), *found,
        piece.query_bounds, piece.key_bounds, max(piece.longest_query, 2), piece.longest_key,
        dropout_p=0.0, softmax_scale=scale, causal=causal, window_size_left=-1,
        window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=True,
    )  # fmt: skip
    return found
