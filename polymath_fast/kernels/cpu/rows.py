"""Passes over rows of fp32 logits: softmax statistics, and the gradient of a policy loss.

A row is read in blocks that stay in the first-level cache; sums run in fp32 inside a block and in
fp64 across blocks. `scale` is 1 / temperature. `logits` is C-contiguous and may be wider than
`vocab`: with strides known only at run time a loop does not become vector code.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, types
from numba.extending import overload

from polymath_fast.kernels.cpu.scalar import bfloat16, exp, maximum, widened

BLOCK = 1024
_FLOOR = np.float32(-100.0)
"""no logit counts as further below than this: exp is 0 there, and 0 * inf is avoided"""
_FAST = {"reassoc", "nsz", "contract", "arcp"}  # NaN and infinity keep their meaning


@njit(nogil=True, cache=True)
def widen(start, stop, source, out):
    """out (R, V) fp32 = source (R, V) bf16 bits, rows [start, stop)."""
    for i in range(start, stop):
        for v in range(source.shape[1]):
            out[i, v] = widened(source[i, v])


@njit(nogil=True, cache=True)
def add_bias(start, stop, logits, bias):
    """logits (R, V) += bias (V,), rows [start, stop)."""
    for i in range(start, stop):
        row = logits[i, : bias.size]
        for v in range(bias.size):
            row[v] += bias[v]


@njit(nogil=True, cache=True)
def statistics(start, stop, logits, vocab, targets, scale, out):
    """What the loss and its gradient need of rows [start, stop).

    logits (R, V) fp32, targets (R,), out (4, R) fp64: log-prob of the target, entropy, log-sum-exp
    of the scaled row, and 1 - probability of the target. Sums leave the target out, so the last
    one keeps its digits where the model is confident.
    """
    for i in range(start, stop):
        row = logits[i, :vocab]
        target = targets[i]
        kept = row[target]
        row[target] = -np.inf
        top, total, moment = _sums(row, scale, kept * scale)
        row[target] = kept
        distance = np.float64(kept * scale) - top
        mine = math.exp(distance)
        everything = total + mine
        log_total = math.log(everything)
        if total < mine:
            out[0, i] = -math.log1p(total / mine)
        else:
            out[0, i] = min(distance - log_total, 0.0)
        if mine > 0:
            moment += mine * distance
        out[1, i] = max(log_total - moment / everything, 0.0)
        out[2, i] = top + log_total
        out[3, i] = total / everything


@njit(nogil=True, cache=True)
def slopes(
    start, stop, logits, vocab, index, targets, scale, found, by_logprob, by_entropy, first, out
):
    """Gradient of the loss with respect to rows index[start:stop] of `logits` (R, V).

    found: `statistics` of the rows. by_logprob, by_entropy (R,) fp32: derivatives of the loss.
    Row index[j] goes to out[first + j], bf16 bits or fp32; columns past V become zero.
    """
    for j in range(start, stop):
        i = index[j]
        target_row = out[first + j]
        shift = np.float32(found[2, i])
        weight = -by_logprob[i] * scale
        bonus = by_entropy[i] * scale
        entropy = np.float32(found[1, i])
        if bonus == 0:
            _policy_slopes(logits[i, :vocab], scale, shift, weight, target_row)
        else:
            _bonus_slopes(logits[i, :vocab], scale, shift, weight, bonus, entropy, target_row)
        logprob = np.float32(found[0, i])
        mine = np.float32(found[3, i]) * by_logprob[i] * scale
        mine -= bonus * exp(logprob) * (max(logprob, _FLOOR) + entropy)
        _store(target_row, targets[i], mine)
        for v in range(vocab, target_row.size):
            _store(target_row, v, np.float32(0))


@njit(nogil=True, cache=True, fastmath=_FAST)
def _sums(row, scale, top):
    """Largest x = row * scale, sum of exp(x - largest) and of exp(x - largest) (x - largest)."""
    total = 0.0
    moment = 0.0
    for first in range(0, row.size, BLOCK):
        block = row[first : first + BLOCK]
        peak = top
        for v in range(block.size):
            peak = maximum(peak, block[v] * scale)
        if peak != top:
            drop = np.float64(top) - peak
            factor = math.exp(drop)
            # an empty sum has nothing to move, and its drop may be infinite
            moment = (moment + total * drop) * factor if total > 0 else 0.0
            total = total * factor if total > 0 else 0.0
            top = peak
        partial = np.float32(0)
        partial_moment = np.float32(0)
        for v in range(block.size):
            x = maximum(block[v] * scale - top, _FLOOR)
            e = exp(x)
            partial += e
            partial_moment += e * x
        total += partial
        moment += partial_moment
    return top, total, moment


@njit(nogil=True, cache=True)
def _policy_slopes(row, scale, shift, weight, out):
    for v in range(row.size):
        _store(out, v, exp(row[v] * scale - shift) * weight)


@njit(nogil=True, cache=True)
def _bonus_slopes(row, scale, shift, weight, bonus, entropy, out):
    for v in range(row.size):
        x = maximum(row[v] * scale - shift, _FLOOR)
        _store(out, v, exp(x) * (weight - bonus * (x + entropy)))


def _store(out, index, value):
    raise NotImplementedError("compiled code only")


@overload(_store, inline="always")
def _compiled_store(out, index, value):
    if out.dtype == types.uint16:

        def store(out, index, value):
            out[index] = bfloat16(value)
    else:

        def store(out, index, value):
            out[index] = value

    return store
