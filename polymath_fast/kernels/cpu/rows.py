"""Passes over rows of logits: softmax statistics, and the gradient of a policy loss.

A row is fp32 and contiguous: with strides known only at run time a loop does not become vector
code. It is read in blocks that stay in the first-level cache; sums run in fp32 inside a block and
in fp64 across blocks. `scale` is 1 / temperature; "found" of a row is log-prob of its target,
entropy, log-sum-exp of the scaled row and 1 - probability of the target.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import overload

from polymath_fast.kernels.cpu import scalar
from polymath_fast.kernels.cpu.jit import INLINED, njit
from polymath_fast.kernels.cpu.scalar import exp, fma, maximum, value, whole_vectors

BLOCK = 1024
_FLOOR = np.float32(-100.0)
"""no logit counts as further below than this: exp is 0 there, and 0 * inf is avoided"""
_FAR = np.float32(80.0)
_FAST = {"reassoc", "nsz", "contract", "arcp"}  # NaN and infinity keep their meaning


@njit()
def head_statistics(start, stop, logits, vocab, bias, targets, scale, found):
    """Statistics of rows [start, stop) of `logits` (R, V + padding), to which `bias` (V,) or (0,)
    is added in place; found (4, R) fp64."""
    whole_vectors()
    for i in range(start, stop):
        row = logits[i, :vocab]
        for v in range(bias.size):
            row[v] += bias[v]
        statistics(row, targets[i], scale, found[:, i])


@njit()
def head_slopes(
    start, stop, logits, vocab, index, targets, scale, found, by_logprob, by_entropy, first, out
):
    """Gradient of the loss with respect to rows index[start:stop] of `logits` (R, V + padding).

    by_logprob, by_entropy (R,) fp32: derivatives of the loss. Row index[j] goes to out[first + j],
    bf16 bits or fp32; columns past V become zero.
    """
    whole_vectors()
    for j in range(start, stop):
        i = index[j]
        target_row = out[first + j]
        _slopes(
            logits[i, :vocab],
            targets[i],
            scale,
            found[:, i],
            by_logprob[i],
            by_entropy[i],
            target_row[:vocab],
            False,
        )
        for v in range(vocab, target_row.size):
            _store(target_row, v, np.float32(0), False)


@njit()
def recorded_slopes(
    start, stop, kept, vocab, kept_rows, index, order, bounds, targets, scale, found, by_logprob,
    first, out,
):  # fmt: skip
    """As `head_slopes` without entropies, of exponentials: those of state i are in row kept_rows[i]
    of `kept` (..., V + padding), bf16 bits or fp32.

    Its targets are order[bounds[i] : bounds[i + 1]] of N, each with by_logprob (N,); found (4, N)
    is what `draw` found of them, of which found[2] is the sum of the exponentials.
    """
    whole_vectors()
    for j in range(start, stop):
        i = index[j]
        members = order[bounds[i] : bounds[i + 1]]
        source, target_row = kept[kept_rows[i]], out[first + j]
        total = 0.0
        for each in members:
            total += np.float64(by_logprob[each])
        weight = np.float32(-total * scale / found[2, members[0]])
        for v in range(vocab):
            _store(target_row, v, value(source[v]) * weight, False)
        for v in range(vocab, target_row.size):
            _store(target_row, v, np.float32(0), False)
        for each in members:
            mine = 0.0
            for other in members:
                if targets[other] == targets[each]:
                    mine += np.float64(by_logprob[other])
            slope = mine * found[3, each] - (total - mine) * math.exp(found[0, each])
            _store(target_row, targets[each], np.float32(slope * scale), False)


@njit()
def logits_statistics(start, stop, source, step, vocab, half, targets, scale, found):
    """Statistics of rows [start, stop); row i is source[i * step :][:vocab], fp32, or bf16 or
    (`half`) fp16 bits."""
    whole_vectors()
    row = np.empty(vocab, np.float32)
    for i in range(start, stop):
        scalar.load_row(source[i * step : i * step + vocab], half, np.float32(1), row)
        statistics(row, targets[i], scale, found[:, i])


@njit()
def logits_slopes(
    start, stop, source, step, vocab, half, targets, scale, found, by_logprob, by_entropy, out,
    out_step,
):  # fmt: skip
    """Gradient of the loss with respect to rows [start, stop); row i goes to
    out[i * out_step :][:vocab], which may be where it came from."""
    whole_vectors()
    row = np.empty(vocab, np.float32)
    for i in range(start, stop):
        target_row = out[i * out_step : i * out_step + vocab]
        if by_logprob[i] == 0 and by_entropy[i] == 0:
            target_row[:] = 0
        else:
            scalar.load_row(source[i * step : i * step + vocab], half, np.float32(1), row)
            _slopes(
                row, targets[i], scale, found[:, i], by_logprob[i], by_entropy[i], target_row, half
            )


@njit()
def statistics(row, target, scale, found):
    """Sums leave the target out, so that 1 - p keeps its digits where the model is confident."""
    whole_vectors()
    kept = row[target]
    row[target] = -np.inf
    top, total, moment = _sums(row, scale, kept * scale)
    row[target] = kept
    finish(kept * scale, top, total, moment, found)


@njit()
def finish(scaled, top, total, moment, found):
    """Statistics by the scaled logit of the target, and sums over the others."""
    distance = np.float64(scaled) - top
    mine = math.exp(distance)
    everything = total + mine
    log_total = math.log(everything)
    if total < mine:
        found[0] = -math.log1p(total / mine)
    else:
        found[0] = min(distance - log_total, 0.0)
    if mine > 0:
        moment += mine * distance
    found[1] = max(log_total - moment / everything, 0.0)
    found[2] = top + log_total
    found[3] = total / everything


@njit(fastmath=_FAST, forceinline=True)
def _sums(row, scale, top):
    """Largest x = row * scale, sum of exp(x - largest) and of exp(x - largest) (x - largest)."""
    whole_vectors()
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
        partial, partial_moment = block_sums(block, scale, top, False)
        total += partial
        moment += partial_moment
    return top, total, moment


@njit(fastmath=_FAST, **INLINED)
def block_sums(block, scale, top, bounded):
    """Sums of exp(x) and of exp(x) x, x = block * scale - top, `_FAR` where it is larger or NaN if
    `bounded`."""
    whole_vectors()
    total = np.float32(0)
    moment = np.float32(0)
    for v in range(block.size):
        x = maximum(block[v] * scale - top, _FLOOR)
        if bounded and not x < _FAR:
            x = _FAR
        e = exp(x)
        total += e
        moment += e * x
    return total, moment


@njit()
def _slopes(row, target, scale, found, by_logprob, by_entropy, out, half):
    """out = d loss / d row, from d loss / d logprob and d loss / d entropy.

    d logprob / d row = scale (onehot - p); d entropy / d row = -scale p (log p + entropy)
    """
    whole_vectors()
    shift = np.float32(found[2])
    rest = np.float32(found[2] - shift)  # what rounding took off, much where logits are large
    entropy = np.float32(found[1])
    weight = -by_logprob * scale
    bonus = by_entropy * scale
    if bonus == 0:
        for v in range(row.size):
            _store(out, v, exp(fma(row[v], scale, -shift) - rest) * weight, half)
    else:
        for v in range(row.size):
            x = maximum(fma(row[v], scale, -shift) - rest, _FLOOR)
            _store(out, v, exp(x) * (weight - bonus * (x + entropy)), half)
    logprob = np.float32(found[0])
    mine = np.float32(found[3]) * by_logprob * scale
    mine -= bonus * exp(logprob) * (max(logprob, _FLOOR) + entropy)
    _store(out, target, mine, half)


def _store(out, index, value, half):
    raise NotImplementedError("compiled code only")


@overload(_store)
def _compiled_store(out, index, value, half):
    if out.dtype == types.uint16:

        def store(out, index, value, half):
            out[index] = scalar.float16(value) if half else scalar.bfloat16(value)
    else:

        def store(out, index, value, half):
            out[index] = value

    return store
