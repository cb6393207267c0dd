"""Matrix products with fp32 results: cuBLAS on half-precision operands, never rounded between."""

from __future__ import annotations

import torch


def product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out (M, N) fp32 = left (M, K) @ right (K, N)."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left.float(), right.float(), out=out)


def add_product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out (M, N) fp32 += left (M, K) @ right (K, N)."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    return out.addmm_(left.float(), right.float())
