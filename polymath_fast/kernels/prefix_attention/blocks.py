"""Several prompts with their completions, one block after the other in a packed row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Block = tuple[int, tuple[int, ...]]
"""prompt length, and completion offsets from the prompt's end, starting at 0"""


def to_blocks(
    given: Sequence[tuple[int, Tensor]], query_rows: int, key_rows: int
) -> tuple[Block, ...]:
    """(prompt_len, cu_seqlens) pairs as numbers.

    Raises:
        ValueError: offsets that do not fit, or blocks that do not cover the rows.
    """
    blocks = []
    for prompt_len, cu_seqlens in given:
        if cu_seqlens.device.type != "cpu":
            raise ValueError(f"cu_seqlens must lie on the CPU, not on {cu_seqlens.device}")
        offsets = cu_seqlens.tolist()
        if not offsets or offsets[0] != 0 or offsets != sorted(offsets):
            raise ValueError("cu_seqlens must start at 0 and never fall, e.g. [0, 5, 9]")
        if prompt_len < 1:
            raise ValueError(f"prompt_len {prompt_len} must be at least 1")
        blocks.append((prompt_len, tuple(offsets)))
    alone = sum(offsets[-1] for _, offsets in blocks)
    rows = alone + sum(prompt_len for prompt_len, _ in blocks)
    if not blocks or rows != key_rows or query_rows not in (rows, alone):
        parts = [f"prompt_len {length} + {offsets[-1]}" for length, offsets in blocks]
        raise ValueError(
            f"{', '.join(parts) or 'no'} completion rows do not fit {key_rows} rows of k and "
            f"{query_rows} of q: k needs all of them, q all or the completions' alone"
        )
    return tuple(blocks)


def one_by_one(
    attend: Callable[[Tensor, Tensor, Tensor, int, tuple[int, ...]], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: tuple[Block, ...],
) -> Tensor:
    """Like q: `attend` on the rows of each block."""
    rows = [prompt_len + offsets[-1] for prompt_len, offsets in blocks]
    alone = [offsets[-1] for _, offsets in blocks]
    queries = q.split(rows if q.shape[0] == k.shape[0] else alone)
    pieces = zip(queries, k.split(rows), v.split(rows), blocks, strict=True)
    outs = [attend(*tensors, *block) for *tensors, block in pieces]
    return outs[0] if len(outs) == 1 else torch.cat(outs)
