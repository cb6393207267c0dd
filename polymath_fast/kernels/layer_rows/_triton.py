"""Row passes of a decoder layer on a GPU: one launch each, bound by memory.

Bytes a row of 2-byte values: norm 4 H, its gradient 8 H; rotation 4 (Hq + Hkv) D in place, its
gradient 4 A D, with head norms 6 A D; SwiGLU 6 I, its gradient 12 I.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from polymath_fast.kernels.triton.layer_kernels import (
    rms_norm_gradient_kernel,
    rms_norm_kernel,
    rotate_gradient_kernel,
    rotate_kernel,
    swiglu_gradient_kernel,
    swiglu_kernel,
)

NORM_ROWS, HEAD_ROWS = 32, 16
"""rows whose shares of a norm's weight gradient one program adds up"""
ROTATE_WARPS = 8
SWIGLU_BLOCK, SWIGLU_WARPS = 1024, 4


def warps_for(entries: int, most: int = 16) -> int:
    """Eight entries a thread, one vector of a 2-byte dtype, unless that takes too many threads."""
    return min(most, max(1, triton.next_power_of_2(entries) // 256))


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See `layer_rows.rms_norm`."""
    rows, width = x.shape
    if rows == 0:
        return
    with torch.cuda.device_of(x):
        rms_norm_kernel[(rows,)](
            x, weight, out, eps, WIDTH=width, BLOCK=triton.next_power_of_2(width),
            num_warps=warps_for(width),
        )  # fmt: skip


def rms_norm_gradient(
    x: Tensor, weight: Tensor, eps: float, upstream: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `layer_rows.rms_norm_gradient`."""
    rows, width = x.shape
    programs = triton.cdiv(rows, NORM_ROWS)
    out = torch.empty_like(x)
    shares = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    if rows:
        with torch.cuda.device_of(x):
            rms_norm_gradient_kernel[(programs,)](
                x, weight, upstream, residual, out, shares, eps, rows,
                RESIDUAL=residual is not None, ROWS=NORM_ROWS, WIDTH=width,
                BLOCK=triton.next_power_of_2(width), num_warps=warps_for(width),
            )  # fmt: skip
    return out, shares.sum(0).to(weight.dtype)


def rotate(
    stacked: Tensor,
    counts: tuple[int, int],
    cos: Tensor,
    sin: Tensor,
    head_norms: tuple[Tensor | None, Tensor | None],
    eps: float,
    out: Tensor,
) -> None:
    """See `layer_rows.rotate`."""
    rows = len(stacked)
    if rows == 0:
        return
    shape = tile_of(counts, stacked.shape[2])
    with torch.cuda.device_of(stacked):
        rotate_kernel[(rows,)](
            stacked, cos, sin, *head_norms, out, eps,
            **shape, NORMS=head_norms[0] is not None, COPY=out.data_ptr() != stacked.data_ptr(),
            num_warps=warps_for(shape["HEADS"] * shape["HALF_BLOCK"], most=ROTATE_WARPS),
        )  # fmt: skip


def rotate_gradient(
    raw: Tensor | None,
    counts: tuple[int, int],
    cos: Tensor,
    sin: Tensor,
    head_norms: tuple[Tensor | None, Tensor | None],
    eps: float,
    upstream: Sequence[Tensor],
    out: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """See `layer_rows.rotate_gradient`."""
    rows, _, size = out.shape
    normalised = head_norms[0] is not None
    at_once = HEAD_ROWS if normalised else 1
    programs = triton.cdiv(rows, at_once)
    shares = None
    if normalised:
        shares = torch.empty(programs, 2, size, dtype=torch.float32, device=out.device)
    if rows:
        shape = tile_of(counts, size)
        with torch.cuda.device_of(out):
            rotate_gradient_kernel[(programs,)](
                raw if normalised else None, cos, sin, *head_norms, *upstream, out, shares, eps,
                rows, **shape, NORMS=normalised, ROWS=at_once,
                num_warps=warps_for(shape["HEADS"] * shape["HALF_BLOCK"], most=ROTATE_WARPS),
            )  # fmt: skip
    if shares is None:
        return None, None
    d_queries, d_keys = shares.sum(0).to(out.dtype)
    return d_queries, d_keys


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """See `layer_rows.swiglu`."""
    rows, width = out.shape
    if rows and width:
        with torch.cuda.device_of(out):
            swiglu_kernel[(rows, triton.cdiv(width, SWIGLU_BLOCK))](
                gate_up, out, WIDTH=width, BLOCK=SWIGLU_BLOCK, num_warps=SWIGLU_WARPS
            )


def swiglu_gradient(gate_up: Tensor, upstream: Tensor, out: Tensor) -> None:
    """See `layer_rows.swiglu_gradient`."""
    rows, width = upstream.shape
    if rows and width:
        with torch.cuda.device_of(out):
            swiglu_gradient_kernel[(rows, triton.cdiv(width, SWIGLU_BLOCK))](
                gate_up, upstream, out, WIDTH=width, BLOCK=SWIGLU_BLOCK, num_warps=SWIGLU_WARPS
            )


def tile_of(counts: tuple[int, int], size: int) -> dict[str, int]:
    """Compile-time sizes of a row's queries and keys, whose halves are one tile each."""
    queries, keys = counts
    return {
        "QUERIES": queries,
        "KEYS": keys,
        "HALF": size // 2,
        "HEADS": triton.next_power_of_2(queries + keys),
        "KEY_HEADS": triton.next_power_of_2(keys),
        "HALF_BLOCK": triton.next_power_of_2(size // 2),
    }
