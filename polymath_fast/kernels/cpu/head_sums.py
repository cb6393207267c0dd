"""Logits of a block of rows, and the sums of each few columns that its softmax needs, taken while
they are in the second-level cache: the target's logit stands in for the largest, not known yet.
"""

from __future__ import annotations

import numpy as np

from polymath_fast.kernels.cpu import blocks
from polymath_fast.kernels.cpu.bf16 import put_logits
from polymath_fast.kernels.cpu.jit import BORROWED, njit
from polymath_fast.kernels.cpu.rows import block_sums, finish, statistics
from polymath_fast.kernels.cpu.tiles import COLUMNS

PANELS = 8
"""of one group of columns"""
_MOST = 1e9
"""of a sum of exponentials by the target's logit: with a larger one the entropy, a difference of
two numbers as large as its logarithm, loses digits"""


def group_count(panels: int) -> int:
    """Groups of so many panels, the last of which may be smaller."""
    return -(-panels // PANELS)


@njit()
def logits_and_sums(
    start, stop, hidden, count, packed, bias, targets, scale, shifts, out, sums
):  # fmt: skip
    """As `bf16.logits`, with `bias` (V,) or (0,); sums (groups, count, 2) fp32, see
    `_shifted_sums`. The range is of groups."""
    spare = np.empty((blocks.rows_of(packed), COLUMNS), np.float32)
    before = np.empty(blocks.SAVED, np.uint8)
    blocks.begin(packed, before)
    for group in range(start, stop):
        first, last = group * PANELS, min((group + 1) * PANELS, packed.shape[0])
        for panel in range(first, last):
            put_logits(panel, hidden, count, packed, out, spare)
        left, right = first * COLUMNS, min(last * COLUMNS, out.shape[1])
        some = out[:count, left:right]
        _shifted_sums(some, left, bias, targets, scale, shifts, sums[group])
    blocks.end(packed, before)


@njit(**BORROWED)
def _shifted_sums(logits, left, bias, targets, scale, shifts, sums):
    """What a few columns of logits (R, C), those from `left` on, give to the statistics: sums (R,
    2) fp32 of exp(x) and exp(x) x without the target, x = logit * scale - shifts (R,); `bias` is
    added in place."""
    for i in range(logits.shape[0]):
        row = logits[i]
        if bias.size:
            _add(bias[left : left + row.size], row)
        target = targets[i] - left
        inside = 0 <= target < row.size
        kept = row[target] if inside else np.float32(0)
        if inside:
            row[target] = -np.inf
        sums[i, 0], sums[i, 1] = block_sums(row, scale, shifts[i], True)
        if inside:
            row[target] = kept


@njit()
def shifted_statistics(start, stop, logits, vocab, targets, scale, shifts, sums, found):
    """As `head_statistics`, from the sums (G, R, 2) of all columns; from the row where its `shifts`
    are far from its largest logit."""
    for i in range(start, stop):
        total = moment = 0.0
        for group in range(sums.shape[0]):
            total += sums[group, i, 0]
            moment += sums[group, i, 1]
        row = logits[i, :vocab]
        if total <= _MOST:
            finish(row[targets[i]] * scale, shifts[i], total, moment, found[:, i])
        else:  # NaN, too
            statistics(row, targets[i], scale, found[:, i])


@njit(**BORROWED)
def _add(values, row):
    for v in range(row.size):
        row[v] += values[v]
