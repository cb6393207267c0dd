"""Attention sections of the GPU suite: shared prompts beside FlexAttention, flash-attn and SDPA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import gpu_sizes, gpu_timing
from benchmarks.attention import check_attention
from benchmarks.attention_rivals import AttentionData, passes, random_data, rivals
from benchmarks.gpu_sections import timed_table
from benchmarks.timing import Variants, late
from polymath_fast.kernels import dispatch, prefix_attention
from polymath_fast.kernels.prefix_attention.blocks import Block
from polymath_fast.kernels.triton import attention_tiles
from polymath_fast.kernels.triton.attention_schedule import Sizes, schedule
from polymath_fast.kernels.triton.attention_tiles import Way

WAYS = {
    "forward": (Way(128, 128, 8, 2), Way(64, 64, 4, 3)),
    "query": (Way(64, 64, 4, 2), Way(128, 32, 8, 3)),
    "key": (Way(32, 64, 4, 2), Way(32, 128, 8, 3)),
}
"""kernel -> tiles that spill nothing on Hopper and might be faster than the chosen ones"""


def _data(prompt: int, count: int, longest: int) -> AttentionData:
    lengths = torch.linspace(longest // 3, longest, count).int()
    sizes = gpu_sizes.SIZES
    return random_data(sizes.attention_heads, sizes.head_size, prompt, lengths, "cuda")


def _operations(data: AttentionData, of_a_pair: int) -> int:
    return of_a_pair * data.pairs * gpu_sizes.SIZES.attention_heads[0] * gpu_sizes.SIZES.head_size


def _implementations() -> dict[str, Callable[..., Tensor]]:
    names = ("triton", "flash") if dispatch.has_flash_attn() else ("triton",)
    return {name: partial(prefix_attention, impl=name) for name in names}


def correct_attention() -> dict[str, Any]:
    """Outputs and gradients against fp64, which may be off as much as eager bf16 is."""
    values = {}
    for shape, numbers in gpu_sizes.SIZES.attention.items():
        data = _data(*numbers).first(6)
        for name, attend in _implementations().items():
            for what, error in check_attention(data, attend).items():
                values[f"{name} {shape} {what}"] = error
    return {"values": values}


def time_attention() -> dict[str, Any]:
    """Forward, then forward and backward, shares by 4 and 14 operations a pair, head and entry."""
    found: list[dict[str, Any]] = []
    for shape, numbers in gpu_sizes.SIZES.attention.items():
        data = _data(*numbers)
        inputs = [data.q, data.k, data.v]
        named: dict[str, Variants] = {}
        for name, implementation in _implementations().items():
            call = partial(_packed, implementation, data)
            named[f"ours, {name}"] = passes(call, inputs, data.grad)
        named["flex attention"] = passes(late(partial(_flex, data)), inputs, data.grad)
        named |= rivals(data)
        for what, operations in (("forward", 4), ("forward and backward", 14)):
            rows = timed_table(
                {name: variants[what] for name, variants in named.items()},
                flop_count=_operations(data, operations),
                repeats=5,
            )["rows"]
            found += [row | {"what": f"{shape} {what}: {row['what']}"} for row in rows]
            gpu_timing.keep({"rows": found})
    return {"rows": found}


def time_tiles() -> dict[str, Any]:
    """Shapes of tiles, one kernel's changed at a time: what `attention_tiles` should hold."""
    prompt, count, longest = next(iter(gpu_sizes.SIZES.attention.values()))
    data = _data(prompt, count, longest)
    kind = attention_tiles.kind_of(data.q.device, data.q.dtype)
    chosen = attention_tiles.TILES[kind][gpu_sizes.SIZES.head_size]
    runs: Variants = {}
    for kernel, ways in WAYS.items():
        what = "forward" if kernel == "forward" else "forward and backward"
        for way in {getattr(chosen, kernel): None, **dict.fromkeys(ways)}:
            label = f"{what}, {kernel} {way.queries}x{way.keys} w{way.warps} s{way.stages}"
            runs[label] = partial(_with_tiles, kind, replace(chosen, **{kernel: way}), data, what)
    work = {"forward": 4, "forward and backward": 14}
    found: list[dict[str, Any]] = []
    for what, operations in work.items():
        some = {label: run for label, run in runs.items() if label.split(",")[0] == what}
        table = timed_table(some, flop_count=_operations(data, operations), repeats=5)
        found += table["rows"]
    return {"rows": found}


def _with_tiles(kind: str, tiles: attention_tiles.Tiles, data: AttentionData, what: str) -> None:
    call = partial(_packed, partial(prefix_attention, impl="triton"), data)
    with mock.patch.dict(attention_tiles.TILES[kind], {gpu_sizes.SIZES.head_size: tiles}):
        passes(call, [data.q, data.k, data.v], data.grad)[what]()


def _packed(
    attend: Callable[..., Tensor], data: AttentionData, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    return attend(q, k, v, data.prompt_len, data.cu_seqlens)


def _flex(data: AttentionData) -> Callable[..., Tensor]:
    """torch's FlexAttention with a mask of the same pairs; making the mask is not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tile, heads = Sizes(128, 128), gpu_sizes.SIZES.attention_heads
    block = Block(data.prompt_len, tuple(data.cu_seqlens.tolist()))
    last = torch.from_numpy(schedule((block,), tile, tile, tile, heads[1]).last)
    last = last.cuda()
    rows = len(data.q)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < last[key])

    mask = create_block_mask(sees, None, None, rows, rows, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(*packed: Tensor) -> Tensor:
        by_head = (x.transpose(0, 1)[None] for x in packed)
        return compiled(*by_head, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attend
