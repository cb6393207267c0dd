"""CPU with AVX512-BF16: compiled tiles, one task a completion and key head.

The prompt's keys and values are packed once a head and read by every task. What the tasks add to
the prompt's gradient is summed per range of tasks and then over ranges, always in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polymath_fast.kernels.autograd import first_order
from polymath_fast.kernels.cpu import attention, tiles
from polymath_fast.kernels.cpu.products import bits
from polymath_fast.kernels.cpu.threads import parallel, split
from polymath_fast.kernels.cpu.workspace import buffer


def fits(q: Tensor, scale: float) -> bool:
    """Whether these kernels compute this attention on this processor."""
    return (
        q.dtype == torch.bfloat16 and q.shape[-1] % tiles.LANES == 0 and scale > 0
    ) and tiles.available(q.dtype)


@dataclass(frozen=True)
class _Work:
    """The tasks of one call: every segment under every key head."""

    table: np.ndarray  # (segments, 4): first query row, rows, first key row, sees the prompt
    ranges: list[tuple[int, int]]
    slots: np.ndarray  # range number by its first task
    most: int
    """rows of the longest segment"""


def _work(prompt_len: int, bounds: tuple[int, ...], key_heads: int, query_rows: int) -> _Work:
    """bounds (B + 1,): key rows at which completions begin; the prompt is a segment of its own,
    unless there are queries of the completions alone."""
    edges = np.array([0, *bounds], dtype=np.int64)
    lengths = np.diff(edges)
    queries = edges[:-1] + query_rows - bounds[-1]
    table = np.stack([queries, lengths, edges[:-1], np.arange(len(lengths)) > 0], axis=1)
    table = np.ascontiguousarray(table[(lengths > 0) & (queries >= 0)])
    ranges = split(len(table) * key_heads)
    slots = np.zeros(len(table) * key_heads + 1, np.int64)
    for number, (start, _) in enumerate(ranges):
        slots[start] = number
    return _Work(table, ranges, slots, int(table[:, 1].max(initial=0)))


class TileAttention(torch.autograd.Function):
    """q (T or T - P, Hq, D), k and v (T, Hkv, D), all bf16 -> out like q."""

    @staticmethod
    def forward(ctx, q, k, v, prompt_len: int, bounds: tuple[int, ...], scale: float):
        q, k, v = (_rows_in_place(x) for x in (q, k, v))
        work = _work(prompt_len, bounds, k.shape[1], len(q))
        keys, _ = _packed("keys", k, prompt_len)
        _, values = _packed("values", v, prompt_len)
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[:2])
        parallel(
            attention.forward, work.ranges, bits(q), bits(k), bits(v), work.table, prompt_len,
            keys, values, np.float32(scale), work.most, bits(out), lse.numpy(),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.work, ctx.prompt_len, ctx.scale = work, prompt_len, scale
        return out

    @staticmethod
    @first_order
    def backward(ctx, d_out):
        q, k, v, out, lse = ctx.saved_tensors
        work, prompt_len = ctx.work, ctx.prompt_len
        keys, key_pairs = _packed("keys", k, prompt_len)
        values, _ = _packed("values", v, prompt_len)
        d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        shares = (len(work.ranges) + 1, k.shape[1], 2, prompt_len, k.shape[2])
        d_prompt = buffer("prompt_gradient", shares, torch.float32).zero_()
        parallel(
            attention.backward, work.ranges, bits(q), bits(k), bits(v), work.table, prompt_len,
            keys, values, key_pairs, np.float32(ctx.scale), work.most, bits(out), lse.numpy(),
            bits(d_out.contiguous()), work.slots, bits(d_q), bits(d_k), bits(d_v), d_prompt.numpy(),
        )  # fmt: skip
        total = d_prompt.sum(0)  # (Hkv, 2, P, D)
        d_k[:prompt_len] = total[:, 0].transpose(0, 1)
        d_v[:prompt_len] = total[:, 1].transpose(0, 1)
        return d_q, d_k, d_v, None, None, None


def _packed(name: str, rows: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` of `rows` (T, H, D), once as columns and once as pairs of rows."""
    heads, size = rows.shape[1:]
    panels, parts = -(-count // attention.PANEL), -(-size // attention.PANEL)
    columns = buffer(f"prompt {name}", (heads, panels, size // 2, attention.PANEL), torch.int32)
    shape = (heads, parts, panels * attention.PANEL // 2, attention.PANEL)
    pairs = buffer(f"prompt {name} pairs", shape, torch.int32).zero_()
    found = columns.numpy().view(np.uint32), pairs.numpy().view(np.uint32)
    parallel(attention.pack_prompt, split(heads), bits(rows), count, *found)
    return found


def _rows_in_place(x: Tensor) -> Tensor:
    """Strided rows and heads are fine; a head's numbers must lie side by side, as even words."""
    if x.stride(-1) == 1 and x.data_ptr() % 4 == 0 and x.stride(0) % 2 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
