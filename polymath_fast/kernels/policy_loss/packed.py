"""Sums and means over the completions of a packed batch, in a fixed order and without a loop."""

from __future__ import annotations

import torch

_LONG, _ROW = 32_768, 1024  # elements: torch sums fewer than the first on one thread


def sequence_ids(cu_seqlens: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) index of the completion that each token belongs to."""
    positions = torch.arange(count, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)


def sequence_sum(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """(N,) -> (B,) sum over each completion; 0 for an empty one."""
    if values.numel() == 0 or cu_seqlens.numel() == 1:
        return values.new_zeros(cu_seqlens.numel() - 1)
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.long(), initial=0)


def sequence_mean(
    values: torch.Tensor, mask: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """(N,) at each token, the mean of `values` over the trained tokens of its completion."""
    lengths = sequence_sum(mask.to(values.dtype), cu_seqlens).clamp(min=1)
    means = sequence_sum(torch.where(mask, values, 0), cu_seqlens) / lengths
    return means[sequence_ids(cu_seqlens, values.numel())]


def steady_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of (N,), the same bits on any number of threads: torch cuts a long one into as many parts
    as it has threads."""
    if values.device.type != "cpu" or values.numel() < _LONG:
        return values.sum()
    return torch.nn.functional.pad(values, (0, -values.numel() % _ROW)).view(-1, _ROW).sum(1).sum()


def either(condition: torch.Tensor, yes: float, no: float, like: torch.Tensor) -> torch.Tensor:
    """One of two numbers, in the dtype of `like`, whatever torch's default dtype is."""
    return torch.where(condition, torch.full_like(like, yes), no)
