"""Flat AdamW in plain PyTorch: the specification."""

from __future__ import annotations

import torch

from polymath_fast.kernels.flat_adamw import halves
from polymath_fast.kernels.flat_adamw.segments import Segments


def squares(grad: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """(n,) -> (1,) fp64 sum of squares of elements [first, last)."""
    return torch.linalg.vector_norm(grad[first:last], dtype=torch.float64).square().reshape(1)


def root(squares: torch.Tensor) -> torch.Tensor:
    """(1,) -> 0-d fp64."""
    return squares.sqrt().reshape(())


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
    factor, spread, rate, decay = coefficients.to(grad.dtype)
    sound = ~factor.isnan()
    for start, stop, decayed in segments.rows:
        span = slice(start, stop)
        g = grad[span] * factor
        m = beta1 * exp_avg[span] + (1 - beta1) * g
        v = beta2 * exp_avg_sq[span] + (1 - beta2) * g * g
        old = master[span]
        old = halves.join(live[span], old) if master.dtype == torch.int16 else old
        p = old - (rate * m / (v.sqrt() * spread + eps) + decay * decayed * old)
        if master.dtype == torch.int16:
            new_live, new_master = halves.split(p)
        else:
            new_live, new_master = halves.rounded(p, live.dtype), p
        states = ((live, new_live), (master, new_master), (exp_avg, m), (exp_avg_sq, v))
        for state, value in states:
            state[span] = torch.where(sound, value, state[span])
        if zero_grad:
            grad[span] = 0
