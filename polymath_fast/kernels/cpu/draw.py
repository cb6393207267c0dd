"""Tokens from logits, with the log-prob of what was drawn: one read of a row for all its tokens.

The distribution function is inverted: sums over blocks of columns, then a walk inside one block.
"""

from __future__ import annotations

import math

import numpy as np

from polymath_fast.kernels.cpu import scalar
from polymath_fast.kernels.cpu.jit import njit
from polymath_fast.kernels.cpu.scalar import exp, maximum, put

BLOCK = 512
_FAST = {"reassoc", "nsz", "contract", "arcp"}
# A process that compiles has a helper twice, by itself and inside `draw`, and runs whichever came
# first; one that loads has the second alone. The two may add in another order, so there is one.
_INLINED = {"forceinline": True, "fastmath": _FAST}
_FLOOR = np.float32(-100.0)


@njit(error_model="numpy")
def draw(
    start, stop, logits, vocab, half, scale, greedy, order, bounds, uniforms, tokens, logprobs,
    kept_rows, kept, kept_half, places, found,
):  # fmt: skip
    """Rows [start, stop) of logits (B, V + padding), fp32 or (`half`: fp16, else bf16) bits, each
    for draws order[bounds[row] : bounds[row + 1]] of C.

    tokens (C,) int64 from softmax(logits * scale); `greedy`: the first of the largest.
    logprobs (C,) fp32 under that softmax, at most 0; uniforms (C,) float64 in [0, 1).

    The exponentials of the distances from the largest logit of a row go to row kept_rows[row] of
    kept (..., V + padding), fp32, or of kept_half, bf16 bits, if that has any; nowhere if that is
    negative. Both kinds have one kernel: neither changes a bit of a draw. Of draw i the log-prob,
    the entropy, the sum of the exponentials and 1 - the token's probability go to row places[i] of
    found (..., 4), if that is not negative.
    """
    row = np.empty(vocab, np.float32)
    masses = np.empty(-(-vocab // BLOCK))
    for i in range(start, stop):
        if bounds[i] == bounds[i + 1]:
            continue
        scalar.load_row(logits[i, :vocab], half, scale, row)
        top = _largest(row)
        largest = _first(row, top) if greedy else -1
        total = moment = 0.0
        for block in range(masses.size):
            some = row[block * BLOCK : (block + 1) * BLOCK]
            masses[block], part = _exponentials(some, top)
            total += masses[block]
            moment += part
        entropy = max(math.log(total) - moment / total, 0.0)
        for at in range(bounds[i], bounds[i + 1]):
            each = order[at]
            token = largest if greedy else _invert(row, masses, uniforms[each] * total)
            mine = np.float64(row[token])
            others = _without(row, masses, token)
            logprob = -math.log1p(others / mine) if others < mine else math.log(mine / total)
            tokens[each] = token
            logprobs[each] = logprob
            if places[each] >= 0:
                statistics = found[places[each]]
                statistics[0] = logprob
                statistics[1] = entropy
                statistics[2] = total
                statistics[3] = others / total
        if kept_rows[i] >= 0:
            if kept_half.shape[0]:
                _keep(row, kept_half[kept_rows[i]])
            else:
                _keep(row, kept[kept_rows[i]])


@njit(**_INLINED)
def _largest(row):
    top = np.float32(-np.inf)
    for v in range(row.size):
        top = maximum(top, row[v])
    return top


@njit(**_INLINED)
def _exponentials(row, top):
    """exp(x) of x = row - top, in place; the sums of exp(x) and of exp(x) x."""
    total = np.float32(0)
    moment = np.float32(0)
    for v in range(row.size):
        x = maximum(row[v] - top, _FLOOR)
        e = exp(x)
        row[v] = e
        total += e
        moment += e * x
    return np.float64(total), np.float64(moment)


@njit()
def _first(row, top):
    for v in range(row.size):
        if row[v] == top:
            return v
    return 0


@njit()
def _invert(row, masses, target):
    """The column at which the running sum of the row passes `target`; never one of mass 0."""
    block = 0
    while block < masses.size - 1 and target >= masses[block]:
        target -= masses[block]
        block += 1
    last = -1
    for v in range(block * BLOCK, min((block + 1) * BLOCK, row.size)):
        if row[v] > 0:
            last = v
            if target < row[v]:
                return v
            target -= row[v]
    return last if last >= 0 else _first(row, np.float32(1))


@njit()
def _without(row, masses, token):
    """The sum over all columns but one, which keeps its digits where that one is nearly all."""
    mine = token // BLOCK
    total = 0.0
    for block in range(masses.size):
        if block != mine:
            total += masses[block]
    for v in range(mine * BLOCK, min((mine + 1) * BLOCK, row.size)):
        if v != token:
            total += np.float64(row[v])
    return total


@njit()
def _keep(row, out):
    for v in range(row.size):
        put(out, v, row[v])
    for v in range(row.size, out.size):
        put(out, v, np.float32(0))
