"""Rows with a gradient first, so that the two backward products are over those alone.

How many there are stays on the device: the kernels read it there and end early. The host launches
as if all rows had a gradient, and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from polymath_fast.kernels.triton.head import Chunk, Head

_ALIGNED = 4
"""int32 numbers in 16 bytes: kernels are compiled for pointers to multiples of those"""


def all_chunks(head: Head) -> Iterator[Chunk]:
    """Every row of the head, for its log-probs and entropies only."""
    count = len(head.hidden)
    index = torch.arange(count, device=head.hidden.device)
    for start in range(0, count, head.rows):
        rows = slice(start, min(start + head.rows, count))
        yield head.chunk(index[rows], rows, None)


def live_chunks(head: Head, live: torch.Tensor, *, others: bool) -> Iterator[Chunk]:
    """Every row of the head, those with a gradient first; they come with `exps`.

    Args:
        live: (N,) bool, whether a row has a gradient.
        others: compute the log-probs of the other rows as well.
    """
    order = live.logical_not().to(torch.uint8).sort(stable=True).indices
    starts = torch.arange(0, len(live), head.rows, device=live.device)
    counts = (live.sum() - starts).clamp(0, head.rows).to(torch.int32)
    counts = counts[:, None].repeat(1, _ALIGNED)
    for chunk, start in enumerate(range(0, len(live), head.rows)):
        yield head.chunk(order[start : start + head.rows], None, counts[chunk, :1], others)
