"""The specification: a segment attends to all that it continues and causally to itself."""

from __future__ import annotations

import torch
from torch import Tensor

from polymath_fast.kernels.prefix_attention.blocks import Block, one_by_one


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: tuple[Block, ...], scale: float
) -> Tensor:
    """Softmax attention written out, one segment at a time, in float32 (float64 for float64)."""

    def attend(q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
        return _block(q, k, v, block, scale)

    return one_by_one(attend, q, k, v, blocks)


def _block(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> Tensor:
    bounds = [0, *(block.prompt_len + offset for offset in block.offsets)]  # the prompt is first
    seen = _rows_seen(block)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    keys = k.to(wide).repeat_interleave(groups, dim=1)  # (T, Hq, D)
    values = v.to(wide).repeat_interleave(groups, dim=1)
    queries = q.to(wide) * scale
    missing = k.shape[0] - q.shape[0]
    outs = []
    for segment, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end <= missing:
            continue
        context = len(seen[segment])
        rows = seen[segment] + list(range(start, end))
        scores = torch.einsum("qhd,khd->hqk", queries[start - missing : end - missing], keys[rows])
        length = end - start
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores[:, :, context:] = scores[:, :, context:].masked_fill(hidden, float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values[rows]))
    return torch.cat([*outs, queries[:0]]).to(q.dtype)


def _rows_seen(block: Block) -> list[list[int]]:
    """Rows that each segment sees besides its own: the prompt none, the others it and more."""
    seen: list[list[int]] = [[]]
    prompt = list(range(block.prompt_len))
    for runs in block.ancestors():
        above = [block.prompt_len + i for start, end in runs for i in range(start, end)]
        seen.append(prompt + above)
    return seen
