"""The specification: every completion attends to the whole prompt and causally to itself."""

from __future__ import annotations

import torch
from torch import Tensor

QUERIES_OF_COMPLETIONS = True  # q may lack the rows of the prompt


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_len: int, cu_seqlens: Tensor, scale: float
) -> Tensor:
    """Softmax attention written out, one segment at a time, in float32 (float64 for float64)."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    keys = k.to(wide).repeat_interleave(groups, dim=1)  # (T, Hq, D)
    values = v.to(wide).repeat_interleave(groups, dim=1)
    queries = q.to(wide) * scale
    missing = k.shape[0] - q.shape[0]
    bounds = [0, *(prompt_len + cu_seqlens).tolist()]
    outs = []
    for segment, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end <= missing:
            continue
        context = 0 if segment == 0 else prompt_len
        rows = list(range(context)) + list(range(start, end))
        scores = torch.einsum("qhd,khd->hqk", queries[start - missing : end - missing], keys[rows])
        length = end - start
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores[:, :, context:] = scores[:, :, context:].masked_fill(hidden, float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values[rows]))
    return torch.cat([*outs, queries[:0]]).to(q.dtype)
