"""The segments of a copy: pairs of matrices, as large as their memory allows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""position = number that the kernels know a dtype by"""

ROW = np.dtype(
    [(name, "<i8") for name in ("src", "dst", "rows", "cols", "src_ld", "dst_ld", "first_chunk")]
)
"""`Segment` of csrc/weight_sync.cu: two addresses, sizes and leading dimensions in elements, and
the number of chunks of all segments before this one"""


@dataclass(frozen=True)
class Segment:
    """(rows, cols) views of one source and one destination, unit stride inside a row."""

    src: Tensor
    dst: Tensor

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        return self.src.dtype, self.dst.dtype


@dataclass(frozen=True)
class Group:
    """Segments of one pair of dtypes: what one launch takes."""

    segments: tuple[Segment, ...]

    def rows(self, chunk: int) -> tuple[np.ndarray, int]:
        """(segments,) of ROW, and the number of chunks of at most `chunk` elements in all."""
        rows = np.empty(len(self.segments), ROW)
        total = 0
        for row, segment in zip(rows, self.segments, strict=True):
            src, dst = segment.src, segment.dst
            row["src"], row["dst"] = src.data_ptr(), dst.data_ptr()
            row["rows"], row["cols"] = src.shape
            row["src_ld"], row["dst_ld"] = src.stride(0), dst.stride(0)
            row["first_chunk"] = total
            total += chunks(*src.shape, chunk)
        return rows, total


class SegmentTable:
    """Which memory is copied where. Neighbours in both source and destination become one segment.

    Attributes:
        segments: in the order of dtypes, then of destination addresses.
        groups: the same by pair of dtypes.
        elements, bytes: what a copy moves; bytes are those read plus those written.
    """

    def __init__(self, sources: Sequence[Tensor], destinations: Sequence[Tensor]) -> None:
        """sources[i] and destinations[i]: views of one shape, fp32, bf16 or fp16, on one device.

        Raises:
            ValueError: shapes, dtypes or devices do not fit, or a row's elements are not adjacent.
        """
        if len(sources) != len(destinations):
            raise ValueError(f"{len(sources)} sources for {len(destinations)} destinations")
        pairs = list(zip(sources, destinations, strict=True))
        found = [segment for pair in pairs for segment in _segments(*map(Tensor.detach, pair))]
        _check_device(found)
        self.destinations = tuple(destinations)
        self.segments = tuple(_merged(sorted(found, key=_order)))
        self.groups = tuple(
            Group(tuple(group)) for _, group in groupby(self.segments, lambda s: s.dtypes)
        )
        self.elements = sum(s.src.numel() for s in self.segments)
        self.bytes = sum(s.src.nbytes + s.dst.nbytes for s in self.segments)
        self._on_device: dict[int, list[tuple[Group, Tensor, int]]] = {}

    def on_device(self, chunk: int) -> list[tuple[Group, Tensor, int]]:
        """Per group, its rows as (segments, 7) int64 beside the weights, and how many chunks."""
        if chunk not in self._on_device:
            entries = []
            for group in self.groups:
                rows, total = group.rows(chunk)
                numbers = torch.from_numpy(rows.view(np.int64)).view(len(rows), -1)
                entries.append((group, numbers.to(group.segments[0].dst.device), total))
            self._on_device[chunk] = entries
        return self._on_device[chunk]


def chunks(rows: int, cols: int, chunk: int) -> int:
    """Pieces a (rows, cols) segment is cut into: whole rows, or parts of one if they are longer."""
    if cols > chunk:
        return rows * -(-cols // chunk)
    return -(-rows // (chunk // cols))


def _segments(src: Tensor, dst: Tensor) -> Iterator[Segment]:
    """A pair as matrices: dimensions that are contiguous in both are folded into one."""
    if src.shape != dst.shape:
        raise ValueError(f"source is {tuple(src.shape)}, destination {tuple(dst.shape)}")
    for name, tensor in (("source", src), ("destination", dst)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}: float32, bfloat16 and float16 work")
    if src.numel() == 0:
        return
    sizes, steps, places = [1], [1], [1]
    for size, step, place in zip(src.shape, src.stride(), dst.stride(), strict=True):
        if size == 1:
            continue
        if steps[-1] == size * step and places[-1] == size * place:
            sizes[-1] *= size
            steps[-1], places[-1] = step, place
        else:
            sizes.append(size)
            steps.append(step)
            places.append(place)
    if sizes[0] == 1 and len(sizes) > 1:
        del sizes[0], steps[0], places[0]
    if steps[-1] != 1 or places[-1] != 1:
        raise ValueError(
            f"elements of a row are {steps[-1]} apart in the source and {places[-1]} in the "
            "destination: both must be adjacent; pass a contiguous tensor"
        )
    src, dst = src.as_strided(sizes, steps), dst.as_strided(sizes, places)
    yield from _matrices(src, dst)


def _matrices(src: Tensor, dst: Tensor) -> Iterator[Segment]:
    if src.ndim > 2:
        for pair in zip(src, dst, strict=True):
            yield from _matrices(*pair)
    else:
        yield Segment(src.reshape(-1, src.shape[-1]), dst.reshape(-1, dst.shape[-1]))


def _order(segment: Segment) -> tuple[int, int, int]:
    return *map(DTYPES.index, segment.dtypes), segment.dst.data_ptr()


def _merged(segments: Iterable[Segment]) -> Iterator[Segment]:
    last: Segment | None = None
    for segment in segments:
        if last is not None and _adjacent(last, segment):
            count = last.src.shape[1] + segment.src.shape[1]
            last = Segment(*(t.as_strided((1, count), (count, 1)) for t in (last.src, last.dst)))
            continue
        if last is not None:
            yield last
        last = segment
    if last is not None:
        yield last


def _adjacent(first: Segment, second: Segment) -> bool:
    if first.dtypes != second.dtypes or len(first.src) != 1 or len(second.src) != 1:
        return False
    return all(
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and a.data_ptr() + a.nbytes == b.data_ptr()
        for a, b in ((first.src, second.src), (first.dst, second.dst))
    )


def _check_device(segments: Iterable[Segment]) -> None:
    devices = {tensor.device for s in segments for tensor in (s.src, s.dst)}
    if len(devices) > 1:
        raise ValueError(
            f"weights lie on {', '.join(sorted(map(str, devices)))}: "
            "learner and engine must use one device"
        )
