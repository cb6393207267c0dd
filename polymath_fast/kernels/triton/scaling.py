"""Multiply gradients by the upstream one, which is nearly always 1, without asking the host.

Nothing is read or written when the factor is 1; else 2 b bytes and one operation an entry.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096
RUN = 16 * BLOCK
"""entries of contiguous memory that one program takes"""


@triton.jit(do_not_specialize=["count"])
def scale_kernel(x_ptr, factor_ptr, stride, columns, count, BLOCK: tl.constexpr):
    """Program r scales `columns` entries from r * stride on, of `count` in all."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        row = tl.program_id(0).to(tl.int64)
        here = tl.minimum(count - row * columns, columns)
        for start in range(0, columns, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < here
            pointers = x_ptr + row * stride + offsets
            x = tl.load(pointers, mask=inside).to(tl.float32)
            tl.store(pointers, (x * factor).to(x_ptr.dtype.element_ty), mask=inside)


def scale_in_place(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """tensor, contiguous or (R, C) with contiguous rows, *= factor (0-d, on the same device)."""
    if tensor.numel():
        if tensor.is_contiguous():
            programs, stride, columns = -(-tensor.numel() // RUN), RUN, RUN
        else:
            (programs, columns), stride = tensor.shape, tensor.stride(0)
        with torch.cuda.device_of(tensor):
            scale_kernel[(programs,)](
                tensor, factor, stride, columns, tensor.numel(), BLOCK=BLOCK, num_warps=4
            )
    return tensor
