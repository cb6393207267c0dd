"""GPU: one kernel for all blocks of a packed row, and gradients without atomics.

The kernels lie in `kernels/triton/attention_kernels.py` and `attention_gradient_kernels.py`, the
tables they follow in `attention_schedule.py`; tables are built and sent once for all layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from polymath_fast.kernels.autograd import first_order
from polymath_fast.kernels.prefix_attention.blocks import Block
from polymath_fast.kernels.transfer import send, stream_of
from polymath_fast.kernels.triton.attention_gradient_kernels import (
    key_gradient_kernel,
    query_gradient_kernel,
    sum_slots_kernel,
)
from polymath_fast.kernels.triton.attention_kernels import attention_kernel, delta_kernel
from polymath_fast.kernels.triton.attention_schedule import schedule
from polymath_fast.kernels.triton.attention_tiles import Tiles, Way, tiles_for, width_of

SUM_ROWS = 8
DELTA_ROWS = 16
LOG2E = 1 / math.log(2)


@dataclass(frozen=True)
class _Tables:
    """A schedule on the device."""

    last: Tensor
    queries: Tensor
    gradients: Tensor
    units: Tensor
    runs: Tensor
    gradient_runs: Tensor
    sums: Tensor
    slots: int
    tiles: Tiles

    @property
    def tree(self) -> bool:
        """Whether a segment continues another one."""
        return len(self.runs) > 0


@lru_cache(maxsize=16)
def _tables(
    blocks: tuple[Block, ...],
    prompts_ask: bool,
    kv_heads: int,
    device: torch.device,
    tiles: Tiles,
    stream: int,
) -> _Tables:
    """What the kernels read of the blocks, on the device, for work of one stream."""
    ways = (tiles.forward, tiles.query, tiles.key)
    made = schedule(blocks, *(way.sizes for way in ways), kv_heads, prompts_ask)
    tables = (
        made.last, made.queries, made.gradients, made.units, made.runs, made.gradient_runs,
        made.sums,
    )  # fmt: skip
    whole = [torch.from_numpy(np.ascontiguousarray(table, dtype=np.int32)) for table in tables]
    parts = send(whole, device)
    return _Tables(*parts, made.slots, tiles)


class PrefixAttention(torch.autograd.Function):
    """q (T, Hq, D), or its rows of completions, and k, v (T, Hkv, D) -> out like q."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tables: _Tables, scale: float):
        q, k, v = (_rows_in_one_piece(x) for x in (q, k, v))
        rows, heads, depth = q.shape
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(heads, rows, device=q.device, dtype=torch.float32)  # base 2
        way = tables.tiles.forward
        with torch.cuda.device_of(q):
            attention_kernel[(len(tables.queries) * heads,)](
                q, k, v, out, lse, tables.last, tables.queries, tables.runs,
                rows, heads, heads // k.shape[1], scale * LOG2E,
                *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
                **_shape(depth, way, q), TREE=tables.tree, num_warps=way.warps,
                num_stages=way.stages,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tables, ctx.scale = tables, scale
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        grad = _rows_in_one_piece(grad)
        with torch.cuda.device_of(q):
            delta = _delta(out, grad)
            given = (q, k, v, grad, lse, delta)
            needs_q, needs_k, needs_v, *_ = ctx.needs_input_grad
            d_q = _query_gradient(*given, ctx.tables, ctx.scale) if needs_q else None
            d_k = d_v = None
            if needs_k or needs_v:
                d_k, d_v = _key_gradient(*given, ctx.tables, ctx.scale)
        return d_q, d_k, d_v, None, None


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: tuple[Block, ...], scale: float
) -> Tensor:
    """See `polymath_fast.kernels.prefix_attention`."""
    tiles = tiles_for(q.device, q.dtype, q.shape[2])
    stream = stream_of(q.device)
    tables = _tables(blocks, len(q) == len(k), k.shape[1], q.device, tiles, stream)
    return PrefixAttention.apply(q, k, v, tables, scale)


def _delta(out: Tensor, grad: Tensor) -> Tensor:
    rows, heads, depth = out.shape
    delta = torch.empty(heads, rows, device=out.device, dtype=torch.float32)
    delta_kernel[(triton.cdiv(rows, DELTA_ROWS) * heads,)](
        out, grad, delta, rows, heads, *grad.stride()[:2],
        DEPTH=depth, WIDTH=width_of(depth), QUERIES=DELTA_ROWS, num_warps=4,
    )  # fmt: skip
    return delta


def _query_gradient(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor,
    tables: _Tables, scale: float,
) -> Tensor:  # fmt: skip
    rows, heads, depth = q.shape
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    way = tables.tiles.query
    query_gradient_kernel[(len(tables.gradients) * heads,)](
        q, k, v, grad, lse, delta, d_q, tables.last, tables.gradients,
        tables.gradient_runs,
        rows, heads, heads // k.shape[1], scale * LOG2E, scale,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad.stride()[:2],
        **_shape(depth, way, q), TREE=tables.tree, num_warps=way.warps, num_stages=way.stages,
    )  # fmt: skip
    return d_q


def _key_gradient(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor,
    tables: _Tables, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    heads, depth = k.shape[1:]
    d_k, d_v = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    way = tables.tiles.key
    sizes = (tables.slots, heads, 2, way.keys, depth)
    slots = torch.empty(sizes, device=k.device, dtype=torch.float32)
    key_gradient_kernel[(len(tables.units) * heads,)](
        q, k, v, grad, lse, delta, d_k, d_v, slots, tables.last, tables.units,
        len(q), heads, q.shape[1] // heads, scale * LOG2E, scale,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad.stride()[:2],
        **_shape(depth, way, q), num_warps=way.warps, num_stages=way.stages,
    )  # fmt: skip
    if tables.slots:
        parts = way.keys // SUM_ROWS
        sum_slots_kernel[(len(tables.sums) * heads * parts,)](
            slots, tables.sums, d_k, d_v, heads,
            DEPTH=depth, WIDTH=width_of(depth), KEYS=way.keys, ROWS=SUM_ROWS, num_warps=4,
        )  # fmt: skip
    return d_k, d_v


def _shape(depth: int, way: Way, q: Tensor) -> dict[str, Any]:
    return {
        "DEPTH": depth,
        "WIDTH": width_of(depth),
        "QUERIES": way.queries,
        "KEYS": way.keys,
        "WIDEN": not q.is_cuda,
    }


def _rows_in_one_piece(x: Tensor) -> Tensor:
    """`x` (T, heads, D), or a copy: tiles are fetched in vectors, and with the address of each
    number to be computed they would have no registers left."""
    steps, depth = x.stride(), x.shape[2]
    aligned = x.data_ptr() % 16 == 0 and steps[0] % 16 == 0 and steps[1] % 16 == 0
    if steps[2] == 1 and (aligned or depth % 16 != 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)
