"""One call into torch for all segments; each runs at the rate of memory on torch's threads.

torch's conversion from fp32 to bf16 is vectorised and moves as many bytes a second as memcpy, so
there is no kernel of our own; large models are few, large segments once neighbours are merged.
"""

from __future__ import annotations

import torch

from polymath_fast.kernels.weight_sync.table import SegmentTable


def weight_sync(table: SegmentTable) -> None:
    """destination <- source, rounded as torch does."""
    for group in table.groups:
        sources = [segment.src for segment in group.segments]
        torch._foreach_copy_([segment.dst for segment in group.segments], sources)
