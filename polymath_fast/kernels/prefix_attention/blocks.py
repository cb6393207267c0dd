"""Several prompts with their completions, one block after the other in a packed row.

The rows behind a prompt are segments. Each continues the prompt or an earlier segment, its parent,
and stands behind it in preorder, so that everything that continues a segment, at once or further
down, is one run of rows right after it. Row i then sees key j when j <= i < reach of j's segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polymath_fast.kernels import checks


class Block(NamedTuple):
    """One prompt and the segments that continue it."""

    prompt_len: int
    offsets: tuple[int, ...]
    """where segments begin, counted from the prompt's end, starting at 0; and their end"""
    parents: tuple[int, ...] = ()
    """the segment that each one continues, -1 for the prompt; empty: all continue the prompt"""

    def reach(self) -> list[int]:
        """The offset of the first row behind each segment that does not see it."""
        reach = list(self.offsets[1:])
        for segment in reversed(range(len(self.parents))):
            parent = self.parents[segment]
            if parent >= 0:
                reach[parent] = max(reach[parent], reach[segment])
        return reach

    def ancestors(self) -> list[tuple[tuple[int, int], ...]]:
        """For each segment the runs of offsets that it sees between the prompt and itself."""
        found: list[tuple[tuple[int, int], ...]] = []
        for parent in self.parents or (-1,) * (len(self.offsets) - 1):
            above = found[parent] if parent >= 0 else ()
            start, end = self.offsets[parent : parent + 2] if parent >= 0 else (0, 0)
            if above and above[-1][1] == start:
                start, above = above[-1][0], above[:-1]
            found.append((*above, (start, end)) if end > start else above)
        return found


def to_blocks(
    given: Sequence[tuple[int, Tensor] | tuple[int, Tensor, Sequence[int]]],
    query_rows: int,
    key_rows: int,
) -> tuple[Block, ...]:
    """(prompt_len, cu_seqlens) or (prompt_len, cu_seqlens, parents) as numbers.

    Raises:
        ValueError: offsets or parents that do not fit, or blocks that do not cover the rows.
    """
    blocks = []
    for prompt_len, cu_seqlens, *more in given:
        checks.check_tensor("cu_seqlens", cu_seqlens)
        if cu_seqlens.device.type != "cpu":
            raise ValueError(f"cu_seqlens must lie on the CPU, not on {cu_seqlens.device}")
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens must be int32 (B + 1,), got {cu_seqlens.dtype} "
                f"{tuple(cu_seqlens.shape)}"
            )
        offsets = cu_seqlens.tolist()
        if not offsets or offsets[0] != 0 or offsets != sorted(offsets):
            raise ValueError("cu_seqlens must start at 0 and never fall, e.g. [0, 5, 9]")
        if prompt_len < 1:
            raise ValueError(f"prompt_len {prompt_len} must be at least 1")
        parents = _parents(more[0] if more else (), len(offsets) - 1)
        blocks.append(Block(prompt_len, tuple(offsets), parents))
    alone = sum(block.offsets[-1] for block in blocks)
    rows = alone + sum(block.prompt_len for block in blocks)
    if not blocks or rows != key_rows or query_rows not in (rows, alone):
        parts = [f"prompt_len {block.prompt_len} + {block.offsets[-1]}" for block in blocks]
        raise ValueError(
            f"{', '.join(parts) or 'no'} completion rows do not fit {key_rows} rows of k and "
            f"{query_rows} of q: k needs all of them, q all or the completions' alone"
        )
    return tuple(blocks)


def _parents(given: Sequence[int], segments: int) -> tuple[int, ...]:
    """Checked; empty where every segment continues the prompt."""
    parents = tuple(int(parent) for parent in given)
    if parents and len(parents) != segments:
        raise ValueError(f"{len(parents)} parents for {segments} segments; give one of each")
    path: list[int] = []  # of the segment before
    for segment, parent in enumerate(parents):
        while path and path[-1] != parent:
            path.pop()
        if parent != -1 and not path:
            raise ValueError(
                f"segment {segment} has parent {parent}; it must be -1 (the prompt), the segment "
                "before it or one that this one continues, e.g. [-1, 0, 0, -1]"
            )
        path.append(segment)
    return parents if any(parent >= 0 for parent in parents) else ()


def one_by_one(
    attend: Callable[[Tensor, Tensor, Tensor, Block], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: tuple[Block, ...],
) -> Tensor:
    """Like q: `attend` on the rows of each block."""
    rows = [block.prompt_len + block.offsets[-1] for block in blocks]
    alone = [block.offsets[-1] for block in blocks]
    queries = q.split(rows if q.shape[0] == k.shape[0] else alone)
    pieces = zip(queries, k.split(rows), v.split(rows), blocks, strict=True)
    outs = [attend(*tensors) for tensors in pieces]
    return outs[0] if len(outs) == 1 else torch.cat(outs)
