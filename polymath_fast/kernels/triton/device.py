"""Device functions that several kernels use. Logits are scaled to base-2 units: y = z log2(e) / T.

A row's softmax is described without its target: how the others sum up, relative to some offset,
and how far the target lies above that offset. 1 - p of a confident model then keeps its digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-150.0)
"""no logit counts as further below than this (base-2 units): 2 ** y is 0 there, 0 * inf is not"""
LOWEST = tl.constexpr(-1e38)
"""a maximum before its first value; finite, so that differences of two stay numbers"""


@triton.jit
def above_floor(y):
    """y, or FLOOR where it is further down; NaN stays NaN."""
    return tl.maximum(y, FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def log1p(x):
    """log(1 + x) of x >= 0 without loss of digits near 0 (Goldberg 1991, theorem 4)."""
    sum_ = 1.0 + x
    exact = sum_ == 1.0
    ratio = tl.log(sum_) * (x / tl.where(exact, 1.0, sum_ - 1.0))
    # beyond 2 ** 24 the correction is nothing, and inf / inf would be NaN
    return tl.where(exact, x, tl.where(x > 1e8, tl.log(sum_), ratio))


@triton.jit
def note_targets(note_ptr, rows, targets, vocab, inside):
    """Leave word for the host (see `faults`) of targets outside [0, vocab); where `inside`."""
    wrong = inside & ((targets < 0) | (targets >= vocab))
    values = tl.minimum(tl.maximum(targets, -2147483648), 2147483647) & 4294967295
    place = rows * 0
    tl.store(note_ptr + place, ((rows + 1) << 32) | values, mask=wrong)
    tl.store(note_ptr + 1 + place, place + vocab, mask=wrong)


@triton.jit
def finish_row(total, moment, distance):
    """Results of a row from sums over all its entries but the target, relative to one offset.

    total: sum of 2 ** y; moment: sum of (2 ** y) y; distance: y of the target.

    Returns log-prob, entropy (nats), 1 - p of the target, and the sum over all entries.
    """
    mine = tl.exp2(distance)
    everything = total + mine
    log_everything = tl.log(everything)
    unlikely = tl.minimum(distance * LN2 - log_everything, 0.0, propagate_nan=tl.PropagateNan.ALL)
    safe = tl.where(mine > 0, mine, 1.0)
    logprob = tl.where(total < mine, -log1p(total / safe), unlikely)
    moment += mine * above_floor(distance)
    entropy = log_everything - LN2 * moment / everything
    entropy = tl.maximum(entropy, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return logprob, entropy, total / everything, everything
