"""Matrix products of the LM head's backward pass, launched; those with fp32 results by cuBLAS."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from polymath_fast.kernels.triton.product_kernels import hidden_gemm_kernel, weight_gemm_kernel
from polymath_fast.kernels.triton.tiles import backward_tiles_for, describable


def product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out (M, N) fp32 = left (M, K) @ right (K, N), by cuBLAS, never rounded between."""
    left, right, options = _for_fp32(left, right)
    return torch.mm(left, right, out=out, **options)


def add_product(left: torch.Tensor, right: torch.Tensor, total: torch.Tensor) -> None:
    """total (M, N) fp32 += left (M, K) @ right (K, N), likewise."""
    left, right, options = _for_fp32(left, right)
    if _adds_in_place(left.device, left.dtype):
        torch.addmm(total, left, right, out=total, **options)
    else:
        total += torch.mm(left, right, **options)


def _for_fp32(
    left: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Operands and options of a product whose result is fp32; only CUDA's take narrower ones."""
    if left.is_cuda and left.dtype != torch.float32:
        return left, right, {"out_dtype": torch.float32}
    return left.float(), right.float(), {}


@functools.cache
def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds products of `dtype` to an fp32 sum; earlier ones want one dtype."""
    if dtype == torch.float32:
        return True
    one, total = torch.ones(8, 8, dtype=dtype, device=device), torch.ones(8, 8, device=device)
    try:
        torch.addmm(total, one, one, out=total, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return bool((total == 9).all())


def hidden_product(
    exps: torch.Tensor,
    weight: torch.Tensor,
    head: torch.Tensor,
    live: torch.Tensor,
    width: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    index: torch.Tensor,
    targets: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """out[index[i]] = a[i] exps[i] @ weight + b[i] head[targets[i]], for the first `live` rows i.

    Args:
        exps: (C, K) bf16 or fp16; weight: (K, H); head: (V, H); out: (N, H); all of one dtype.
        live: (1,) int32 on the device, how many rows.
        width: (1,) int32, how many of the K columns; None: all; 0: `out` stays as it is.
        a, b: (C,) fp32; index, targets: (C,) int64.
    """
    (rows, columns), depth = exps.shape, weight.shape[1]
    described = describable(exps) and describable(weight)
    tiles = backward_tiles_for(out.device, exps, weight, out)
    operands = [exps, weight]
    if described:
        operands = _descriptors((exps, (tiles.m, tiles.k)), (weight, (tiles.k, tiles.n)))
    hidden_gemm_kernel[(triton.cdiv(rows, tiles.m) * triton.cdiv(depth, tiles.n),)](
        *operands,
        live,
        width,
        a,
        b,
        index,
        targets,
        head,
        out,
        rows,
        columns,
        depth,
        exps.stride(0),
        weight.stride(0),
        head.stride(0),
        out.stride(0),
        SOME=width is not None,
        DESCRIPTORS=described,
        WIDEN=not out.is_cuda,
        **tiles.options(),
    )


def weight_product(
    exps: torch.Tensor,
    scaled: torch.Tensor,
    live: torch.Tensor,
    width: torch.Tensor | None,
    out: torch.Tensor,
    *,
    add: bool,
) -> None:
    """out (K, H) fp32 = exps.T @ scaled, or += where `add`, over the first `live` rows.

    Args:
        exps: (C, K), scaled: (C, H), of one dtype, zeros past the live rows up to a whole tile.
        live: (1,) int32 on the device.
        width: (1,) int32, how many rows of `out` are made; None: all.
    """
    columns, depth = exps.shape[1], scaled.shape[1]
    described = describable(exps) and describable(scaled)
    tiles = backward_tiles_for(out.device, exps, scaled)
    operands = [exps, scaled]
    if described:
        operands = _descriptors((exps, (tiles.k, tiles.m)), (scaled, (tiles.k, tiles.n)))
    weight_gemm_kernel[(triton.cdiv(columns, tiles.m) * triton.cdiv(depth, tiles.n),)](
        *operands,
        live,
        width,
        out,
        columns,
        depth,
        exps.stride(0),
        scaled.stride(0),
        SOME=width is not None,
        ADD=add,
        DESCRIPTORS=described,
        WIDEN=not out.is_cuda,
        **tiles.options(),
    )


def _descriptors(*matrices: tuple[torch.Tensor, tuple[int, int]]) -> list[TensorDescriptor]:
    """Of the tiles of each matrix."""
    return [TensorDescriptor.from_tensor(matrix, list(tile)) for matrix, tile in matrices]
