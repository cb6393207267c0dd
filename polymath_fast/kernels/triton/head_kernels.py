"""Forward kernels of the LM head: a matrix product whose epilogue ends in softmax sums.

The logit of a row's target is known before the product (N dot products of length H). The epilogue
can therefore turn each tile of logits z into E = 2 ** (y - y_target), y = z log2(e) / T, with no
running maximum and no second pass: E is stored in bf16 with the target's column zero, and sums of E
and E y of each row and tile in fp32. log p = -log1p(sum E) keeps its digits where p is near 1, and
the backward pass multiplies E itself.

2 N H V operations and, for tiles of M x K and K x V entries, N V 2 bytes of E written,
N H V 2 (1 / 256 + 1 / 128) bytes read, most of them from the L2 cache. Rows whose target is so
unlikely that E would overflow are computed again, relative to their largest logit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from polymath_fast.kernels.triton.device import (
    FLOOR,
    LOG2E,
    LOWEST,
    above_floor,
    finish_row,
    note_targets,
)

LIMIT = tl.constexpr(46.0)
"""a logit this far above the target's (base-2 units) makes its row be computed again"""


@triton.jit(do_not_specialize=["temperature"])
def target_logits_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    index_ptr,
    note_ptr,
    y_target_ptr,
    offset_ptr,
    stride_hidden,
    stride_weight,
    vocab,
    depth,
    temperature,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: y of its target, NaN for a target outside [0, vocab), which is noted."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    note_targets(note_ptr, tl.load(index_ptr + row), target, vocab, True)
    valid = (target >= 0) & (target < vocab)
    # a mask of blocks alone: Triton's interpreter takes the bits of a scalar condition for numbers
    end = tl.where(valid, depth, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, depth, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < end
        x = tl.load(hidden_ptr + row * stride_hidden + offsets, mask=inside, other=0.0)
        w = tl.load(weight_ptr + target * stride_weight + offsets, mask=inside, other=0.0)
        total += x.to(tl.float32) * w.to(tl.float32)
    z = tl.sum(total, axis=0)
    if BIAS:
        z += tl.load(bias_ptr + target, mask=valid, other=0.0).to(tl.float32)
    y = tl.where(valid, z * (LOG2E / temperature), float("nan"))
    tl.store(y_target_ptr + row, y)
    tl.store(offset_ptr + row, tl.where(tl.abs(y) < -LOWEST, y, 0.0))


@triton.jit(do_not_specialize=["rows", "temperature"])
def exp_gemm_kernel(
    hidden,
    weight,
    bias_ptr,
    targets_ptr,
    offset_ptr,
    again_ptr,
    any_ptr,
    live_ptr,
    exps_ptr,
    partial_ptr,
    rows,
    vocab,
    depth,
    stride_hidden,
    stride_weight,
    stride_exps,
    temperature,
    BIAS: tl.constexpr,
    STORE: tl.constexpr,
    OTHERS: tl.constexpr,
    AGAIN: tl.constexpr,
    FLATTEN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Tiles of E and, in partial (3, tiles, rows) fp32, their rows' sums of E, E y and largest y.

    hidden (rows, depth) and weight (vocab, depth) are descriptors or pointers. Programs take tiles
    in turn. STORE: E of the first `live` rows, zeros in what is left of their last tile. OTHERS:
    sums of the rows after them, too. AGAIN: only rows that `again` marks, nothing if `any` is 0.
    FLATTEN: join the loops over tiles and over their depth, so that loads for the next tile begin
    before this one's epilogue; for few programs that have many tiles each, all of them wanted.
    WIDEN: for Triton's interpreter, which takes the bits of bf16 operands for integers.
    """
    live = rows
    if STORE:
        live = tl.load(live_ptr)
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(vocab, BLOCK_N)
    if AGAIN:
        tiles = tl.where(tl.load(any_ptr) != 0, tiles, 0)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = tile_of(tile, rows, vocab, BLOCK_M, BLOCK_N, GROUP_M)
        row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        last = rows
        if not OTHERS:
            last = tl.where(tile_m * BLOCK_M < live, rows, 0)
        wanted = row < last
        if AGAIN:
            wanted = wanted & (tl.load(again_ptr + row, mask=wanted, other=0) != 0)
        busy = True
        if AGAIN or not OTHERS or not FLATTEN:
            busy = tl.max(wanted.to(tl.int32), axis=0) != 0
        if busy:
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if DESCRIPTORS:
                for k in range(0, tl.cdiv(depth, BLOCK_K)):
                    x = hidden.load([tile_m * BLOCK_M, k * BLOCK_K])
                    w = weight.load([tile_n * BLOCK_N, k * BLOCK_K])
                    total = dot(x, w.T, total, WIDEN)
            else:
                inner = tl.arange(0, BLOCK_K)
                # rows past the end read the first ones again; what comes of it is not stored
                x_ptrs = (
                    hidden + (row % rows).to(tl.int64)[:, None] * stride_hidden + inner[None, :]
                )
                w_ptrs = (
                    weight + (column % vocab).to(tl.int64)[None, :] * stride_weight + inner[:, None]
                )
                for k in range(0, tl.cdiv(depth, BLOCK_K)):
                    left = depth - k * BLOCK_K
                    x = tl.load(x_ptrs, mask=inner[None, :] < left, other=0.0)
                    w = tl.load(w_ptrs, mask=inner[:, None] < left, other=0.0)
                    total = dot(x, w, total, WIDEN)
                    x_ptrs += BLOCK_K
                    w_ptrs += BLOCK_K
            target = tl.load(targets_ptr + row, mask=wanted, other=-1).to(tl.int32)
            offset = tl.load(offset_ptr + row, mask=wanted, other=0.0)
            scale = LOG2E / temperature
            left, right = halves(total)
            near = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
            end = vocab - tile_n * BLOCK_N
            sum_e = tl.zeros([BLOCK_M], tl.float32)
            sum_ey = tl.zeros([BLOCK_M], tl.float32)
            top = tl.full([BLOCK_M], FLOOR, tl.float32)
            for half in tl.static_range(2):
                some = right if half else left
                near += half * (BLOCK_N // 2)
                # constants against one number: a condition a column would spill registers where
                # the vocabulary is no multiple of 16
                inside = tl.arange(0, BLOCK_N // 2) < end - half * (BLOCK_N // 2)
                if BIAS:
                    bias = tl.load(bias_ptr + near, mask=inside, other=0.0)
                    some += bias.to(tl.float32)[None, :]
                kept = inside[None, :] & (near[None, :] != target[:, None])
                y = tl.where(kept, above_floor(some * scale - offset[:, None]), FLOOR)
                e = tl.exp2(y)
                sum_e += tl.sum(e, axis=1)
                sum_ey += tl.sum(e * y, axis=1)
                top = tl.maximum(top, tl.max(y, axis=1))
                if STORE:  # noqa: SIM102 - Triton has no short-circuit over a tensor
                    if tile_m * BLOCK_M < live:
                        # the row's sums stay NaN; in E it would spread to every gradient
                        e = tl.where((e == e) & (row < live)[:, None], e, 0.0)
                        place = exps_ptr + row.to(tl.int64)[:, None] * stride_exps + near[None, :]
                        # to the end of the row in memory, a multiple of 64: any vocabulary's end
                        # would make every store one of single numbers
                        mask = wanted[:, None] & (near < stride_exps)[None, :]
                        tl.store(place, e.to(exps_ptr.dtype.element_ty), mask=mask)
            place = partial_ptr + tile_n.to(tl.int64) * rows + row
            plane = tl.cdiv(vocab, BLOCK_N).to(tl.int64) * rows
            tl.store(place, sum_e, mask=wanted)
            tl.store(place + plane, sum_ey, mask=wanted)
            tl.store(place + 2 * plane, top, mask=wanted)


@triton.jit
def halves(tile):
    """Left and right half of a tile (M, N): what follows a product then needs fewer registers."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, [M, 2, N // 2]), [0, 2, 1]))


@triton.jit
def dot(x, w, total, WIDEN: tl.constexpr):
    if WIDEN:
        return tl.dot(x.to(tl.float32), w.to(tl.float32), total)
    return tl.dot(x, w, total)


@triton.jit
def tile_of(
    program, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
):
    """Row and column of a tile; GROUP_M tiles of rows go through the columns together."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    first = group * GROUP_M
    size = tl.minimum(tiles_m - first, GROUP_M)
    inside = program - group * GROUP_M * tiles_n
    return first + inside % size, inside // size


@triton.jit(do_not_specialize=["rows", "tiles"])
def finish_kernel(
    partial_ptr,
    y_target_ptr,
    offset_ptr,
    again_ptr,
    any_ptr,
    live_ptr,
    found_ptr,
    rows,
    tiles,
    AGAIN: tl.constexpr,
    OTHERS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Sums of tiles -> found (4, rows): log-prob, entropy, 1 - p of the target, 1 / sum of the row.

    The last one is relative to the row's offset, as E is. Without AGAIN: marks the rows that must
    be computed again and moves their offset; with it: finishes those. Without OTHERS the rows from
    `live` on have no sums, and become NaN.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    wanted = row < rows
    computed = wanted
    if not OTHERS:
        computed = wanted & (row < tl.load(live_ptr))
    if AGAIN:
        wanted = wanted & (tl.load(again_ptr + row, mask=wanted, other=0) != 0)
        if tl.max(wanted.to(tl.int32), axis=0) == 0:
            return
    plane = tiles.to(tl.int64) * rows
    total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    moment = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    top = tl.full([BLOCK_T, BLOCK_R], FLOOR, tl.float32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        mask = (tile < tiles)[:, None] & computed[None, :]
        place = partial_ptr + tile.to(tl.int64)[:, None] * rows + row[None, :]
        total += tl.load(place, mask=mask, other=0.0)
        moment += tl.load(place + plane, mask=mask, other=0.0)
        top = tl.maximum(top, tl.load(place + 2 * plane, mask=mask, other=FLOOR))
    row_total = tl.sum(total, axis=0)
    row_moment = tl.sum(moment, axis=0)
    y_target = tl.load(y_target_ptr + row, mask=wanted, other=0.0)
    offset = tl.load(offset_ptr + row, mask=wanted, other=0.0)
    logprob, entropy, rest, everything = finish_row(row_total, row_moment, y_target - offset)
    logprob = tl.where(computed, logprob, float("nan"))
    wide = rows.to(tl.int64)
    tl.store(found_ptr + row, logprob, mask=wanted)
    tl.store(found_ptr + row + wide, entropy, mask=wanted)
    tl.store(found_ptr + row + 2 * wide, rest, mask=wanted)
    tl.store(found_ptr + row + 3 * wide, 1.0 / everything, mask=wanted)
    if not AGAIN:
        highest = tl.max(top, axis=0)
        again = highest > LIMIT
        tl.store(again_ptr + row, again.to(tl.int8), mask=wanted)
        if tl.max((wanted & again).to(tl.int32), axis=0) != 0:
            tl.store(any_ptr, 1)
        tl.store(offset_ptr + row, offset + highest, mask=wanted & again)
