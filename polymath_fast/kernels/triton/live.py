"""Rows with a gradient first, so that the two backward products are over those alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from polymath_fast.kernels.triton.head import Chunk, Head


class LiveRows:
    """Rows ordered by whether they have a gradient; how many do is fetched without a pause.

    The host needs the number to size a product. It is copied while the device works on the first
    chunk, whose rows do not depend on it. During the capture of a CUDA graph nothing can be
    fetched, and all rows count as live.
    """

    def __init__(self, live: torch.Tensor) -> None:
        """live: (N,) bool."""
        self.order = live.logical_not().to(torch.uint8).sort(stable=True).indices
        self._count = live.sum()
        self._ready = None
        if live.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                self._count = torch.tensor(len(live))
                return
            self._count = self._count.to("cpu", non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(live.device))

    def count(self) -> int:
        """Number of live rows."""
        if self._ready is not None:
            self._ready.synchronize()
        return int(self._count)


def all_chunks(head: Head) -> Iterator[Chunk]:
    """Every row of the head, for its log-probs and entropies only."""
    count = len(head.hidden)
    index = torch.arange(count, device=head.hidden.device)
    for start in range(0, count, head.rows):
        rows = slice(start, min(start + head.rows, count))
        yield head.chunk(index[rows], rows, keep=False)


def live_chunks(
    head: Head, live: LiveRows, *, others: bool
) -> Iterator[tuple[Chunk, Chunk | None]]:
    """Pairs of a chunk and its live rows, which come with `exps`; None where it has none.

    others: visit rows without a gradient as well, for their log-probs.
    """
    if not len(live.order):
        return
    first = live.order[: head.rows]
    chunk = head.chunk(first, None, keep=True)
    count = live.count()
    yield chunk, first_rows(chunk, min(count, len(first)))
    for index in live.order[len(first) : count].split(head.rows):
        if len(index):
            chunk = head.chunk(index, None, keep=True)
            yield chunk, chunk
    rest = live.order[max(count, len(first)) :]
    for index in rest.split(head.rows) if others else ():
        if len(index):
            yield head.chunk(index, None, keep=False), None


def first_rows(chunk: Chunk, count: int) -> Chunk | None:
    """The first `count` rows of a chunk; None when that is none."""
    if count == len(chunk.index):
        return chunk
    if count == 0:
        return None
    return Chunk(
        chunk.index[:count],
        chunk.hidden[:count],
        chunk.targets[:count],
        chunk.found[:, :count],
        chunk.exps[:count],
    )
