"""An fp32 number as two halves: the nearest bf16, and 16 bits that say how far away it lies.

Rounding to even would not do: an even bf16 is nearest to 65,537 numbers, ties on both sides
included, which 16 bits cannot tell apart. With ties away from zero each has 65,536. So wherever
weights are rounded to bf16 here, with or without a kept remainder, ties go away from zero; the
error is at most half a unit in the last place either way.
"""

from __future__ import annotations

import torch


def split(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 -> its nearest bf16, and the int16 that `join` needs to give the value back."""
    bits = value.contiguous().view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join(upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """bf16 and int16 of `split` -> the fp32 value, every bit of it."""
    high = upper.contiguous().view(torch.int16).to(torch.int32) << 16
    return (high + lower.to(torch.int32)).view(torch.float32)


def rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`value` (fp32 or fp64) in the dtype of live weights."""
    return split(value.float())[0] if dtype == torch.bfloat16 else value.to(dtype)
