"""The specification: torch's copy_, one segment after the other."""

from __future__ import annotations

from polymath_fast.kernels.weight_sync.table import SegmentTable


def weight_sync(table: SegmentTable) -> None:
    """destination <- source, rounded as torch does."""
    for segment in table.segments:
        segment.dst.copy_(segment.src)
