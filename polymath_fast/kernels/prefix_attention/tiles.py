"""CPU with AVX512-BF16, or float32 with fused multiply-add: compiled tiles, one task a segment and
key head.

The prompt's keys and values are packed once a head and read by every task. What the tasks add to
the gradient of keys that several see is summed per range of tasks and then over ranges, always in
the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from polymath_fast.kernels.autograd import first_order
from polymath_fast.kernels.cpu import attention, attention_gradient, attention_keys, tiles
from polymath_fast.kernels.cpu.attention_parts import pack_prompt
from polymath_fast.kernels.cpu.operands import bits
from polymath_fast.kernels.cpu.panel_blocks import PANEL
from polymath_fast.kernels.cpu.threads import parallel, split
from polymath_fast.kernels.cpu.workspace import buffer
from polymath_fast.kernels.prefix_attention.blocks import Block

_SHARES = 32 * 2**20
"""bytes for the sums that ranges of tasks keep apart; fewer ranges take less"""


def fits(q: Tensor, scale: float) -> bool:
    """Whether these kernels compute this attention on this processor."""
    return q.shape[-1] % tiles.LANES == 0 and scale > 0 and tiles.available(q.dtype)


@dataclass(frozen=True)
class _Work:
    """The tasks of one call, every segment under every key head; see `attention.forward`."""

    table: np.ndarray  # (segments, 7)
    runs: np.ndarray  # (runs, 3)
    ranges: list[tuple[int, int]]
    slots: np.ndarray  # range number by its first task
    shared: Tensor  # (shared rows,) their key rows: the prompt's, then of segments with children
    most: int
    """keys of the longest path behind the prompt, or of the prompt"""


@lru_cache(maxsize=16)
def _work(block: Block, key_heads: int, row_bytes: int, alone: bool, threads: int) -> _Work:
    """alone: there are queries of the completions alone; row_bytes: of a shared row's sums."""
    prompt, offsets = block.prompt_len, block.offsets
    above = block.ancestors() or [()] * (len(offsets) - 1)
    places = np.full(offsets[-1], -1)
    for run in {run for runs in above for run in runs}:
        places[slice(*run)] = 0
    inner = np.flatnonzero(places == 0)
    places[inner] = prompt + np.arange(len(inner))
    lines = [] if alone else [(0, prompt, 0, 0, 0, 0, 0)]
    runs: list[tuple[int, int, int]] = []
    most = 0 if alone else prompt
    for start, end, path in zip(offsets, offsets[1:], above, strict=False):
        if end == start:
            continue
        query = start if alone else prompt + start
        line = (query, end - start, prompt + start, 1, len(runs), len(runs) + len(path))
        lines.append((*line, places[start]))
        runs += [(prompt + low, high - low, places[low]) for low, high in path]
        most = max(most, end - start + sum(high - low for low, high in path))
    shared = prompt + len(inner)
    tasks = len(lines) * key_heads
    per_thread = max(1, min(8, _SHARES // (shared * row_bytes * threads)))
    ranges = split(tasks, per_thread=per_thread)
    slots = np.zeros(tasks + 1, np.int64)
    for number, (start, _) in enumerate(ranges):
        slots[start] = number
    return _Work(
        np.array(lines, np.int64).reshape(-1, 7),
        np.array(runs, np.int64).reshape(-1, 3),
        ranges,
        slots,
        torch.cat([torch.arange(prompt), torch.from_numpy(prompt + inner)]),
        most,
    )


class TileAttention(torch.autograd.Function):
    """q (T or T - P, Hq, D), k and v (T, Hkv, D), all bf16 or all fp32 -> out like q."""

    @staticmethod
    def forward(ctx, q, k, v, block: Block, scale: float):
        work = _work_of(q, k, block)
        keys, values = _packed(k, v, block.prompt_len)
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        parallel(
            attention.forward, work.ranges, bits(q), bits(k), bits(v), work.table, work.runs,
            block.prompt_len, keys, values, np.float32(scale), work.most, bits(out), lse.numpy(),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.block, ctx.scale = block, scale
        return out

    @staticmethod
    @first_order
    def backward(ctx, d_out):
        q, k, v, out, lse = ctx.saved_tensors
        return *gradient(q, k, v, out, lse, d_out, ctx.block, ctx.scale), None, None


def gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    block: Block,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of out; lse (as many rows as q, Hq) float32."""
    work, (_, key_heads, size) = _work_of(q, k, block), k.shape
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    rows, width = len(work.shared) + tiles.LANES, -(-size // PANEL) * PANEL
    shares = (len(work.ranges) + 1, key_heads, 2, rows, width)
    d_shared = buffer("shared_gradient", shares, torch.float32).zero_()
    parallel(
        attention_gradient.backward, work.ranges, bits(q), bits(k), bits(v), work.table, work.runs,
        block.prompt_len, _prompts(k, v, block.prompt_len), np.float32(scale), work.most,
        bits(out), lse.numpy(), bits(d_out.contiguous()), work.slots, bits(d_q), bits(d_k),
        bits(d_v), d_shared.numpy(),
    )  # fmt: skip
    total = d_shared.sum(0)[:, :, : len(work.shared), :size]  # (Hkv, 2, shared rows, D)
    d_k[work.shared] = total[:, 0].transpose(0, 1).to(d_k.dtype)
    d_v[work.shared] = total[:, 1].transpose(0, 1).to(d_v.dtype)
    return d_q, d_k, d_v


def _prompts(k: Tensor, v: Tensor, count: int) -> attention_keys.Keys:
    """The first `count` keys and values of every head."""
    heads, size = k.shape[1:]
    kind = bits(k).dtype
    found = attention_keys.room_for_keys(count, size, kind, (heads,))
    parallel(attention_keys.pack_prompt_keys, split(heads), bits(k), bits(v), count, found)
    return found


def _work_of(q: Tensor, k: Tensor, block: Block) -> _Work:
    _, key_heads, size = k.shape
    row_bytes = key_heads * 2 * size * 4
    return _work(block, key_heads, row_bytes, len(q) < len(k), torch.get_num_threads())


def _packed(k: Tensor, v: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` keys (T, H, D) as columns, and as many values as rows of words."""
    heads, size = k.shape[1:]
    panels, parts, per_word = -(-count // PANEL), -(-size // PANEL), 4 // k.element_size()
    keys = buffer("prompt keys", (heads, panels, size // per_word, PANEL), torch.int32)
    shape = (heads, parts, panels * PANEL // per_word, PANEL)
    values = buffer("prompt values", shape, torch.int32).zero_()
    kind = np.float32 if per_word == 1 else np.uint32
    found = keys.numpy().view(kind), values.numpy().view(kind)
    parallel(pack_prompt, split(heads), bits(k), bits(v), count, *found)
    return found
