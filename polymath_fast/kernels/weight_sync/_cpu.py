"""All segments in one parallel pass, with stores that do not read what they overwrite.

A plain store loads its cache line first, which is a third of the traffic of a copy; these go past
the caches. Work is cut as on a GPU: chunks of rows, or of one long row, found by binary search.
Rounding to bf16 is spelled out in integers. Pairs with fp16 on one side are left to torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from polymath_fast.kernels.cpu import threads
from polymath_fast.kernels.cpu.jit import njit
from polymath_fast.kernels.weight_sync.table import ROW, SegmentTable

CHUNK = 1 << 15
LANES = 32
_LINE = 64  # bytes of LANES 16-bit elements, the alignment that stores past the caches want
_i16, _i32 = ir.IntType(16), ir.IntType(32)
_FIRST_CHUNK = ROW.names.index("first_chunk")


def weight_sync(table: SegmentTable) -> None:
    """destination <- source, rounded as torch does, on torch.get_num_threads() threads."""
    for group, rows, chunks in table.on_device(CHUNK):
        src, dst = group.segments[0].dtypes
        if src == dst or (src, dst) == (torch.float32, torch.bfloat16):
            sizes = (CHUNK, src.itemsize // 2, src != dst)
            threads.parallel(_copy_chunks, threads.split(chunks), rows.numpy(), *sizes)
        else:
            sources = [segment.src for segment in group.segments]
            torch._foreach_copy_([segment.dst for segment in group.segments], sources)


@njit()
def _copy_chunks(start, stop, table, size, halves, convert):
    """Chunks start to stop of `table` (segments, 7); a kept element is `halves` times 16 bits."""
    scale, wide = (4, 2) if convert else (2 * halves, 2 * halves)
    for index in range(start, stop):
        place = np.searchsorted(table[:, _FIRST_CHUNK], index, side="right") - 1
        src, dst, rows, cols, src_ld, dst_ld, first = table[place]
        if cols > size:
            pieces = (cols + size - 1) // size
            row = (index - first) // pieces
            col = (index - first) % pieces * size
            height, width = 1, min(size, cols - col)
        else:
            fit = size // cols
            row, col = (index - first) * fit, 0
            height, width = min(fit, rows - row), cols
        for r in range(row, row + height):
            source = src + (r * src_ld + col) * scale
            target = dst + (r * dst_ld + col) * wide
            if convert:
                _round_line(source, target, width)
            else:
                _copy_line(source, target, width * halves)
    _fence()


def _line_of(convert: bool) -> Any:
    """A function that moves `count` elements to 16 bits each, LANES at a time where lines begin."""
    one, lanes, size = _mover(1, convert), _mover(LANES, convert), 4 if convert else 2

    @njit(inline="always")
    def move(src, dst, count):
        head = min(count, (_LINE - dst % _LINE) % _LINE // 2)
        body = head + (count - head) // LANES * LANES
        for i in range(head):
            one(src + size * i, dst + 2 * i)
        for i in range(head, body, LANES):
            lanes(src + size * i, dst + 2 * i)
        for i in range(body, count):
            one(src + size * i, dst + 2 * i)

    return move


def _mover(lanes: int, convert: bool) -> Any:
    """`lanes` elements from one address to another; the target of many lies on a line."""
    words, halves = ir.VectorType(_i32, lanes), ir.VectorType(_i16, lanes)

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        kind = words if convert else halves
        value = builder.load(
            builder.inttoptr(args[0], kind.as_pointer()), align=4 if convert else 2
        )
        if convert:
            value = builder.trunc(_nearest(builder, value, lanes), halves)
        target = builder.inttoptr(args[1], halves.as_pointer())
        store = builder.store(value, target, align=_LINE if lanes == LANES else 2)
        if lanes == LANES:
            store.set_metadata("nontemporal", builder.module.add_metadata([_i32(1)]))
        return context.get_dummy_value()

    @intrinsic
    def move(typing_context, src, dst):
        return types.void(types.intp, types.intp), emit

    return move


def _nearest(builder: ir.IRBuilder, bits: ir.Value, lanes: int) -> ir.Value:
    """bf16 bits, in 32, of fp32 bits: to the nearest, ties to even; NaN becomes 0x7fff."""

    def all_of(number: int) -> ir.Constant:
        return ir.Constant(bits.type, [number] * lanes)

    odd = builder.and_(builder.lshr(bits, all_of(16)), all_of(1))
    rounded = builder.add(builder.add(bits, all_of(0x7FFF)), odd)
    size = builder.and_(bits, all_of(0x7FFFFFFF))
    nan = builder.icmp_unsigned(">", size, all_of(0x7F800000))
    return builder.select(nan, all_of(0x7FFF), builder.lshr(rounded, all_of(16)))


@intrinsic
def _fence(typing_context):
    """Stores past the caches are seen by others before anything that follows."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit


_round_line, _copy_line = _line_of(True), _line_of(False)
