"""Flat AdamW on a GPU: two launches and a sum for the norm, one for everything else, no waiting.

The bytes are those of `_cpu`. Products and sums that belong together are fused by name, so that the
kernels with an fp32 master and with a remainder give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polymath_fast.kernels.flat_adamw.segments import Segments

BLOCK, WARPS = 1024, 8
"""elements a program updates: four a thread, one vector of each fp32 tensor"""
NORM_BLOCK, NORM_STEPS, NORM_WARPS = 1024, 16, 4
"""a program of the norm adds up the squares of NORM_STEPS blocks"""


@triton.jit(do_not_specialize=["count"])
def squares_kernel(grad_ptr, out_ptr, count, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """out[program] = sum of squares of STEPS blocks, in fp64."""
    start = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    total = tl.zeros([BLOCK], tl.float64)
    # a mask with an end known only at run time would make every load one of single numbers
    if start + BLOCK * STEPS <= count:
        for step in range(STEPS):
            offsets = start + step * BLOCK + tl.arange(0, BLOCK)
            wide = tl.load(grad_ptr + offsets).to(tl.float64)
            total += wide * wide
    else:
        for step in range(STEPS):
            offsets = start + step * BLOCK + tl.arange(0, BLOCK)
            wide = tl.load(grad_ptr + offsets, mask=offsets < count, other=0.0).to(tl.float64)
            total += wide * wide
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["count"])
def update_kernel(
    live_ptr,
    master_ptr,
    m_ptr,
    v_ptr,
    grad_ptr,
    segments_ptr,
    numbers_ptr,
    count,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    REMAINDER: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of BLOCK elements; segments (3, count) int64: starts, stops, decayed."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    low = 0
    high = count
    while low < high:  # the first segment that ends behind `start`
        middle = (low + high) // 2
        if tl.load(segments_ptr + count + middle) > start:
            high = middle
        else:
            low = middle + 1
    offsets = start + tl.arange(0, BLOCK)
    numbers = (beta1, rest1, beta2, rest2, eps)
    whole = False
    if low < count:
        whole = tl.load(segments_ptr + low) <= start
        whole = whole & (tl.load(segments_ptr + count + low) >= start + BLOCK)
    if whole:
        decayed = tl.load(segments_ptr + 2 * count + low)
        _update(
            live_ptr, master_ptr, m_ptr, v_ptr, grad_ptr, numbers_ptr, offsets, None, decayed,
            numbers, REMAINDER, ZERO,
        )  # fmt: skip
    else:
        while low < count:
            first = tl.load(segments_ptr + low)
            mask = (offsets >= first) & (offsets < tl.load(segments_ptr + count + low))
            decayed = tl.load(segments_ptr + 2 * count + low)
            _update(
                live_ptr, master_ptr, m_ptr, v_ptr, grad_ptr, numbers_ptr, offsets, mask, decayed,
                numbers, REMAINDER, ZERO,
            )  # fmt: skip
            low = tl.where(first < start + BLOCK, low + 1, count)


@triton.jit
def _update(
    live_ptr,
    master_ptr,
    m_ptr,
    v_ptr,
    grad_ptr,
    numbers_ptr,
    offsets,
    mask,
    decayed,
    numbers,
    REMAINDER: tl.constexpr,
    ZERO: tl.constexpr,
):
    """Elements `offsets`, those that `mask` leaves."""
    beta1, rest1, beta2, rest2, eps = numbers
    factor = tl.load(numbers_ptr)
    if factor == factor:
        g = tl.load(grad_ptr + offsets, mask=mask) * factor
        m = tl.fma(tl.load(m_ptr + offsets, mask=mask), beta1, g * rest1)
        v = tl.fma(tl.load(v_ptr + offsets, mask=mask), beta2, g * rest2 * g)
        below = tl.fma(tl.sqrt_rn(v), tl.load(numbers_ptr + 1), eps)
        rate = tl.load(numbers_ptr + 2)
        decay = tl.where(decayed != 0, tl.load(numbers_ptr + 3), 0.0)
        p = _read(live_ptr, master_ptr, offsets, mask, REMAINDER)
        p = p - tl.fma(p, decay, tl.div_rn(m, below) * rate)
        _write(live_ptr, master_ptr, offsets, mask, p, REMAINDER)
        tl.store(m_ptr + offsets, m, mask=mask)
        tl.store(v_ptr + offsets, v, mask=mask)
    if ZERO:
        tl.store(grad_ptr + offsets, tl.zeros_like(offsets).to(tl.float32), mask=mask)


@triton.jit
def _read(live_ptr, master_ptr, offsets, mask, REMAINDER: tl.constexpr):
    if REMAINDER:
        upper = tl.load(live_ptr + offsets, mask=mask).to(tl.int32) << 16
        lower = tl.load(master_ptr + offsets, mask=mask).to(tl.int32)
        p = (upper + lower).to(tl.float32, bitcast=True)
    else:
        p = tl.load(master_ptr + offsets, mask=mask)
    return p


@triton.jit
def _write(live_ptr, master_ptr, offsets, mask, p, REMAINDER: tl.constexpr):
    """bf16 as int16 bits: rounded with ties away from zero, which lets 16 bits hold the rest."""
    bits = p.to(tl.int32, bitcast=True)
    if REMAINDER:
        tl.store(master_ptr + offsets, bits.to(tl.int16), mask=mask)
    else:
        tl.store(master_ptr + offsets, p, mask=mask)
    if live_ptr.dtype.element_ty == tl.int16:
        tl.store(live_ptr + offsets, ((bits + 0x8000) >> 16).to(tl.int16), mask=mask)
    else:
        tl.store(live_ptr + offsets, p.to(live_ptr.dtype.element_ty), mask=mask)


def squares(grad: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """(n,) fp32 -> (chunks,) fp64 sums of squares of elements [first, last), 0 for other chunks."""
    chunk = NORM_BLOCK * NORM_STEPS
    sums = torch.zeros(triton.cdiv(len(grad), chunk), dtype=torch.float64, device=grad.device)
    if first < last:
        with torch.cuda.device_of(grad):
            squares_kernel[(triton.cdiv(last - first, chunk),)](
                grad[first:last],
                sums[first // chunk :],
                last - first,
                BLOCK=NORM_BLOCK,
                STEPS=NORM_STEPS,
                num_warps=NORM_WARPS,
            )
    return sums


def root(squares: torch.Tensor) -> torch.Tensor:
    """(chunks,) -> 0-d fp64 root of their sum."""
    return squares.sum().sqrt()


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
    if not segments.rows:
        return
    with torch.cuda.device_of(live):
        update_kernel[(triton.cdiv(len(live), BLOCK),)](
            live.view(torch.int16) if live.dtype == torch.bfloat16 else live,
            master,
            exp_avg,
            exp_avg_sq,
            grad,
            segments.table,
            coefficients.float(),
            len(segments.rows),
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            eps,
            REMAINDER=master.dtype == torch.int16,
            ZERO=zero_grad,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
