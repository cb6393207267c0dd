"""One token a row from logits, with the log-prob of what was drawn: two reads of a row.

The distribution function is inverted: sums over blocks of columns, then a walk inside one block.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from polymath_fast.kernels.cpu import scalar
from polymath_fast.kernels.cpu.scalar import exp, maximum

BLOCK = 512
_FAST = {"reassoc", "nsz", "contract", "arcp"}
_FLOOR = np.float32(-100.0)


@njit(nogil=True, cache=True)
def draw(start, stop, logits, vocab, half, scale, greedy, uniforms, tokens, logprobs):
    """Rows [start, stop) of logits (B, V + padding), fp32 or (`half`: fp16, else bf16) bits.

    tokens (B,) int64 from softmax(logits * scale); `greedy`: the first of the largest.
    logprobs (B,) fp32 under that softmax, at most 0; uniforms (B,) float64 in [0, 1).
    """
    row = np.empty(vocab, np.float32)
    masses = np.empty(-(-vocab // BLOCK))
    for i in range(start, stop):
        scalar.load_row(logits[i, :vocab], half, scale, row)
        top = _largest(row)
        total = 0.0
        for block in range(masses.size):
            masses[block] = _mass(row[block * BLOCK : (block + 1) * BLOCK], top)
            total += masses[block]
        token = _first(row, top) if greedy else _invert(row, top, masses, uniforms[i] * total)
        tokens[i] = token
        logprobs[i] = min(np.float64(row[token] - top) - math.log(total), 0.0)


@njit(nogil=True, cache=True, fastmath=_FAST)
def _largest(row):
    top = np.float32(-np.inf)
    for v in range(row.size):
        top = maximum(top, row[v])
    return top


@njit(nogil=True, cache=True, fastmath=_FAST)
def _mass(row, top):
    total = np.float32(0)
    for v in range(row.size):
        total += exp(maximum(row[v] - top, _FLOOR))
    return np.float64(total)


@njit(nogil=True, cache=True)
def _first(row, top):
    for v in range(row.size):
        if row[v] == top:
            return v
    return 0


@njit(nogil=True, cache=True)
def _invert(row, top, masses, target):
    """The column at which the running sum of exponentials passes `target`; never one of mass 0."""
    block = 0
    while block < masses.size - 1 and target >= masses[block]:
        target -= masses[block]
        block += 1
    last = -1
    for v in range(block * BLOCK, min((block + 1) * BLOCK, row.size)):
        e = exp(maximum(row[v] - top, _FLOOR))
        if e > 0:
            last = v
            if target < e:
                return v
            target -= e
    if last >= 0:
        return last
    return _first(row, top)
