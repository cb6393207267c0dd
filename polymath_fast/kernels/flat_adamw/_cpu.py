"""Flat AdamW on a CPU: one compiled pass, bound by memory.

Bytes a weight: 4 for the norm; 18 read and 14 written with an fp32 master of bf16 weights, 16 and
12 with a remainder or with fp32 weights; 4 more where the gradient is cleared.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from polymath_fast.kernels.cpu import adamw
from polymath_fast.kernels.cpu.threads import parallel, split
from polymath_fast.kernels.flat_adamw.segments import Segments

_QUANTUM = 1 << 14
"""elements; threads write to pages of their own"""


def squares(grad: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """(n,) fp32 -> (chunks,) fp64 sums of squares of elements [first, last), 0 for other chunks;
    the same bits on any number of threads."""
    found = np.zeros(-(-len(grad) // adamw.CHUNK))
    own = found[first // adamw.CHUNK : -(-last // adamw.CHUNK)]
    if own.size:
        parallel(adamw.squares, split(own.size), grad[first:last].numpy(), own)
    return torch.from_numpy(found)


def root(squares: torch.Tensor) -> torch.Tensor:
    """(chunks,) -> 0-d fp64 root of their sum."""
    return torch.tensor(math.sqrt(squares.numpy().sum()), dtype=torch.float64)


def flat_adamw(
    live: torch.Tensor,
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad: torch.Tensor,
    segments: Segments,
    coefficients: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    zero_grad: bool,
) -> None:
    """All (n,); coefficients (4,) fp64 as `flat_adamw._coefficients` makes them."""
    factor, spread, rate, decay = coefficients.tolist()
    if math.isnan(factor):
        for start, stop, _ in segments.rows if zero_grad else ():
            grad[start:stop] = 0
        return
    numbers = (factor, beta1, 1 - beta1, beta2, 1 - beta2, spread, eps, rate, decay)
    if master.data_ptr() == live.data_ptr():
        weights = torch.empty(0, dtype=torch.uint8)
    else:
        weights = live if live.dtype == torch.float32 else live.view(torch.uint16)
    parallel(
        adamw.update,
        split(len(live), _QUANTUM),
        weights.numpy(),
        master.numpy(),
        exp_avg.numpy(),
        exp_avg_sq.numpy(),
        grad.numpy(),
        segments.table.numpy(),
        live.dtype == torch.float16,
        zero_grad,
        tuple(np.float32(number) for number in numbers),
    )
