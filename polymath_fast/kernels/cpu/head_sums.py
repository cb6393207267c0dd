"""Logits of a block of rows, and the sums of each few columns that its softmax needs, taken while
they are in the second-level cache: the target's logit stands in for the largest, not known yet.
"""

from __future__ import annotations

import numpy as np

from polymath_fast.kernels.cpu import blocks, rows
from polymath_fast.kernels.cpu.bf16 import put_logits
from polymath_fast.kernels.cpu.jit import njit
from polymath_fast.kernels.cpu.tiles import COLUMNS

PANELS = 8
"""of one group of columns"""


def group_count(panels: int) -> int:
    """Groups of so many panels, the last of which may be smaller."""
    return -(-panels // PANELS)


@njit()
def logits_and_sums(
    start, stop, hidden, count, packed, bias, targets, scale, shifts, out, sums
):  # fmt: skip
    """As `bf16.logits`, with `bias` (V,) or (0,); sums (groups, count, 2) fp32, see
    `rows.shifted_sums`. The range is of groups."""
    spare = np.empty((blocks.rows_of(packed), COLUMNS), np.float32)
    before = np.empty(blocks.SAVED, np.uint8)
    blocks.begin(packed, before)
    for group in range(start, stop):
        first, last = group * PANELS, min((group + 1) * PANELS, packed.shape[0])
        for panel in range(first, last):
            put_logits(panel, hidden, count, packed, out, spare)
        left, right = first * COLUMNS, min(last * COLUMNS, out.shape[1])
        some = out[:count, left:right]
        rows.shifted_sums(some, left, bias, targets, scale, shifts, sums[group])
    blocks.end(packed, before)
