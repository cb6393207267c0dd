"""AdamW over ranges of flat arrays, and the sum of squares of their gradient.

Products and sums that belong together are fused by name, nothing else is: a weight's bits depend
neither on where a range begins nor on whether it fell into vector code.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from polymath_fast.kernels.cpu import scalar
from polymath_fast.kernels.cpu.jit import njit
from polymath_fast.kernels.cpu.scalar import fma

CHUNK = 1 << 16
"""elements whose squares are added up in an order that depends on nothing else"""
BLOCK = 1024
"""elements whose updates stay in the first-level cache between two loops"""


@njit()
def squares(start, stop, grad, out):
    """out[c] = sum of squares of chunk c of `grad`, in fp64; the range is of chunks."""
    for chunk in range(start, stop):
        out[chunk] = _squares(grad[chunk * CHUNK : (chunk + 1) * CHUNK])


@njit(fastmath={"reassoc", "nsz", "contract"}, forceinline=True)
def _squares(values):
    total = 0.0
    for i in range(values.size):
        wide = np.float64(values[i])
        total += wide * wide
    return total


@njit()
def update(start, stop, live, master, m, v, grad, segments, half, zero, numbers):
    """One step of elements [start, stop) that lie in `segments` (3, S): starts, stops, decayed.

    live: bf16 or (`half`) fp16 bits, or fp32; uint8 of any length where master is the weights
    itself, for loops over memory under two names are not vector code. master: fp32, or the int16
    remainder of bf16 bits.
    """
    factor, beta1, rest1, beta2, rest2, spread, eps, rate, decay = numbers
    room = np.empty(BLOCK, np.float32)
    for s in range(segments.shape[1]):
        fade = decay if segments[2, s] else np.float32(0)
        last = min(stop, segments[1, s])
        for first in range(max(start, segments[0, s]), last, BLOCK):
            span = slice(first, min(last, first + BLOCK))
            steps = room[: span.stop - first]
            _moments(
                grad[span], factor, beta1, rest1, beta2, rest2, spread, eps, m[span], v[span], steps
            )
            if zero:
                grad[span] = 0
            _step(live[span], master[span], steps, rate, fade, half)


@njit(error_model="numpy")
def _moments(grad, factor, beta1, rest1, beta2, rest2, spread, eps, m, v, steps):
    """Both moments in place, and what the learning rate multiplies."""
    for i in range(steps.size):
        g = grad[i] * factor
        first = fma(beta1, m[i], rest1 * g)
        second = fma(beta2, v[i], rest2 * g * g)
        m[i] = first
        v[i] = second
        steps[i] = first / fma(np.sqrt(second), spread, eps)


@njit()
def _step(live, master, steps, rate, decay, half):
    for i in range(steps.size):
        p = _read(live, master, i)
        _write(live, master, i, p - fma(decay, p, rate * steps[i]), half)


def _read(live, master, index):
    raise NotImplementedError("compiled code only")


@overload(_read)
def _compiled_read(live, master, index):
    if master.dtype == types.int16:
        return lambda live, master, index: scalar.whole(live[index], master[index])
    return lambda live, master, index: master[index]


def _write(live, master, index, value, half):
    raise NotImplementedError("compiled code only")


@overload(_write)
def _compiled_write(live, master, index, value, half):
    if live.dtype == types.uint8:

        def write(live, master, index, value, half):
            master[index] = value
    elif live.dtype == types.float32:

        def write(live, master, index, value, half):
            master[index] = value
            live[index] = value
    elif master.dtype == types.int16:

        def write(live, master, index, value, half):
            master[index] = scalar.lower_half(value)
            live[index] = scalar.upper_half(value)
    else:

        def write(live, master, index, value, half):
            master[index] = value
            live[index] = scalar.float16(value) if half else scalar.upper_half(value)

    return write
