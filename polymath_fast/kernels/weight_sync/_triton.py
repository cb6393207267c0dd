"""One program a chunk; the segment that a chunk belongs to is found by binary search.

Bytes: each source element read once, each destination element written once. Rounding to bf16 is
spelled out in integers: the same bits on every backend, and in Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polymath_fast.kernels.weight_sync.table import SegmentTable

CHUNK = 1 << 15
BLOCK = 4096
WARPS = 8
FIELDS = tl.constexpr(7)
"""int64 numbers of a segment: src, dst, rows, cols, src_ld, dst_ld, first_chunk"""
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _converted(x, SRC: tl.constexpr, DST: tl.constexpr):
    """x as DST; equal types keep their bits."""
    if SRC == DST:
        return x
    wide = x.to(tl.float32)
    if tl.bfloat16 == DST:
        bits = wide.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFF, nearest)
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return wide.to(DST)


@triton.jit
def _copy_line(
    src,
    dst,
    count,
    SRC: tl.constexpr,
    DST: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`count` adjacent elements; addresses that are multiples of 16 get 16-byte accesses."""
    src_ptr, dst_ptr = src.to(tl.pointer_type(SRC)), dst.to(tl.pointer_type(DST))
    if ALIGNED:
        src_ptr, dst_ptr = tl.multiple_of(src_ptr, 16), tl.multiple_of(dst_ptr, 16)
    whole = count // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(src_ptr + place, eviction_policy="evict_first")
        tl.store(dst_ptr + place, _converted(x, SRC, DST), eviction_policy="evict_first")
    if whole < count:
        # a mask would keep the accesses of whole blocks from being wide
        place = whole + tl.arange(0, BLOCK)
        inside = place < count
        x = tl.load(src_ptr + place, mask=inside)
        tl.store(dst_ptr + place, _converted(x, SRC, DST), mask=inside)


@triton.jit
def _copy_rows(
    src, dst, rows, cols, src_ld, dst_ld, SRC: tl.constexpr, DST: tl.constexpr, BLOCK: tl.constexpr
):
    """(rows, cols) elements whose rows are apart."""
    src_ptr, dst_ptr = src.to(tl.pointer_type(SRC)), dst.to(tl.pointer_type(DST))
    count = rows * cols
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < count
        row = place // cols
        col = place - row * cols
        x = tl.load(src_ptr + row.to(tl.int64) * src_ld + col, mask=inside)
        tl.store(dst_ptr + row.to(tl.int64) * dst_ld + col, _converted(x, SRC, DST), mask=inside)


@triton.jit(do_not_specialize=["segments"])
def weight_sync_kernel(
    table_ptr,
    segments,
    SRC: tl.constexpr,
    DST: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i copies chunk i."""
    index = tl.program_id(0).to(tl.int64)
    low, high = 0, segments - 1
    while low < high:
        middle = (low + high + 1) // 2
        below = tl.load(table_ptr + middle * FIELDS + 6) <= index
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle - 1)
    entry = table_ptr + low * FIELDS
    src, dst = tl.load(entry), tl.load(entry + 1)
    rows, cols = tl.load(entry + 2), tl.load(entry + 3)
    src_ld, dst_ld = tl.load(entry + 4), tl.load(entry + 5)
    index -= tl.load(entry + 6)
    if cols > CHUNK:
        pieces = tl.cdiv(cols, CHUNK)
        row, col = index // pieces, index % pieces * CHUNK
        height, width = tl.full((), 1, tl.int64), tl.minimum(cols - col, CHUNK)
    else:
        fit = CHUNK // cols
        row, col = index * fit, tl.full((), 0, tl.int64)
        height, width = tl.minimum(rows - row, fit), cols
    src += (row * src_ld + col) * (SRC.primitive_bitwidth // 8)
    dst += (row * dst_ld + col) * (DST.primitive_bitwidth // 8)
    if height > 1:
        _copy_rows(
            src, dst, height.to(tl.int32), width.to(tl.int32), src_ld, dst_ld, SRC, DST, BLOCK
        )
    elif (src | dst) % 16 == 0:
        _copy_line(src, dst, width.to(tl.int32), SRC, DST, True, BLOCK)
    else:
        _copy_line(src, dst, width.to(tl.int32), SRC, DST, False, BLOCK)


def weight_sync(table: SegmentTable) -> None:
    """destination <- source on the current stream, one launch for each pair of dtypes."""
    with torch.cuda.device_of(table.segments[0].dst):
        for group, rows, chunks in table.on_device(CHUNK):
            src, dst = (TYPES[dtype] for dtype in group.segments[0].dtypes)
            weight_sync_kernel[(chunks,)](
                rows,
                len(group.segments),
                SRC=src,
                DST=dst,
                CHUNK=CHUNK,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
