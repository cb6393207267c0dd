"""Logits of a block of rows, and the sums of each few columns that its softmax needs, taken while
they are in the second-level cache: the target's logit stands in for the largest, not known yet.
"""

from __future__ import annotations

import numpy as np

from polymath_fast.kernels.cpu import blocks
from polymath_fast.kernels.cpu.bf16 import put_logits
from polymath_fast.kernels.cpu.jit import BORROWED, njit
from polymath_fast.kernels.cpu.rows import block_sums, finish, statistics
from polymath_fast.kernels.cpu.scalar import whole_vectors
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
    start, stop, hidden, count, packed, vocab, bias, targets, scale, shifts, out, sums, chosen
):  # fmt: skip
    """As `bf16.logits`, with `bias` (V,) or (0,); sums (groups, count, 2) and chosen (count,) fp32,
    see `_shifted_sums`. The range is of groups. If `out` has no rows, logits stay in the
    second-level cache, where the next group's take their place."""
    whole_vectors()
    held = out.shape[0] > 0
    room = np.empty((0 if held else count, PANELS * COLUMNS), np.float32)
    spare = np.empty((blocks.rows_of(packed), COLUMNS), np.float32)
    before = np.empty(blocks.SAVED, np.uint8)
    blocks.begin(packed, before)
    for group in range(start, stop):
        first, last = group * PANELS, min((group + 1) * PANELS, packed.shape[0])
        left, right = first * COLUMNS, min(last * COLUMNS, vocab)
        some = out[:count, left:right] if held else room[:, : right - left]
        for panel in range(last - first):
            put_logits(panel, hidden, count, packed[first:], some, spare)
        _shifted_sums(some, left, bias, targets, scale, shifts, sums[group], chosen)
    blocks.end(packed, before)


@njit(**BORROWED)
def _shifted_sums(logits, left, bias, targets, scale, shifts, sums, chosen):
    """What a few columns of logits (R, C), those from `left` on, give to the statistics: sums (R,
    2) fp32 of exp(x) and exp(x) x without the target, x = logit * scale - shifts (R,), and chosen
    (R,) the target's logit if it is one of them; `bias` is added in place."""
    whole_vectors()
    for i in range(logits.shape[0]):
        row = logits[i]
        if bias.size:
            _add(bias[left : left + row.size], row)
        target = targets[i] - left
        inside = 0 <= target < row.size
        kept = row[target] if inside else np.float32(0)
        if inside:
            chosen[i] = kept
            row[target] = -np.inf
        sums[i, 0], sums[i, 1] = block_sums(row, scale, shifts[i], True)
        if inside:
            row[target] = kept


@njit()
def shifted_statistics(start, stop, scale, shifts, sums, chosen, found, far):
    """As `head_statistics`, from the sums (G, R, 2) of all columns and the targets' logits; but for
    rows that become `far` (R,) bool: `shifts` are far from their largest logit, or it is not
    finite."""
    for i in range(start, stop):
        total = moment = 0.0
        for group in range(sums.shape[0]):
            total += sums[group, i, 0]
            moment += sums[group, i, 1]
        far[i] = not total <= _MOST  # NaN, too
        if not far[i]:
            finish(chosen[i] * scale, shifts[i], total, moment, found[:, i])


@njit()
def far_statistics(start, stop, logits, vocab, targets, scale, found, far):
    """`head_statistics` of the rows that are `far`, whose logits have their bias."""
    for i in range(start, stop):
        if far[i]:
            statistics(logits[i, :vocab], targets[i], scale, found[:, i])


@njit(**BORROWED)
def _add(values, row):
    for v in range(row.size):
        row[v] += values[v]
