"""Sections of the GPU suite: the LM head's matrix products alone, beside cuBLAS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks import gpu_sizes
from benchmarks.gpu_head import random_head
from benchmarks.gpu_sections import timed_table
from benchmarks.timing import Variants
from polymath_fast.kernels.triton import head
from polymath_fast.kernels.triton.products import hidden_product, product, weight_product
from polymath_fast.kernels.triton.tiles import Tiles

TILES = (
    Tiles(128, 256, 64, 8, 3),
    Tiles(128, 256, 64, 8, 4),
    Tiles(128, 128, 64, 4, 3),
    Tiles(128, 128, 64, 8, 4),
    Tiles(256, 128, 64, 8, 3),
    Tiles(128, 256, 64, 8, 3, group=8),
    Tiles(128, 256, 64, 8, 3, group=32),
    Tiles(128, 256, 64, 8, 3, persistent=True),
    Tiles(128, 256, 64, 8, 3, group=8, persistent=True),
    Tiles(128, 128, 64, 4, 4, persistent=True),
)


def time_tiles() -> dict[str, Any]:
    """The product alone, in chunks, for shapes of tiles: forward pass without E."""
    found: list[dict[str, Any]] = []
    sizes = gpu_sizes.SIZES
    for depth, vocab in (sizes.small_head, sizes.large_head):
        hidden, weight, targets = random_head(sizes.rows, vocab, depth)
        variants: Variants = {}
        for tiles in TILES:
            for keep in (False, True):
                label = f"H={depth} {tiles.m}x{tiles.n}x{tiles.k} w{tiles.warps} s{tiles.stages}"
                label += f" g{tiles.group}" + " persistent" * tiles.persistent
                variants[label + " stored" * keep] = _product_alone(
                    hidden, weight, targets, tiles, keep
                )
        logits = torch.empty(sizes.rows, vocab, dtype=torch.bfloat16, device="cuda")
        variants[f"H={depth} cuBLAS bf16 product"] = lambda a=hidden, b=weight, out=logits: (
            torch.mm(a, b.T, out=out)
        )
        found += timed_table(variants, flop_count=2 * sizes.rows * vocab * depth)["rows"]
    return {"rows": found}


def _product_alone(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, tiles: Tiles, keep: bool
) -> Callable[[], None]:
    lm_head = head.Head(hidden, weight, None, targets, 1.0)
    lm_head.tiles = replace(tiles)
    index = torch.arange(len(hidden), device="cuda")
    live = torch.full((1,), len(hidden), dtype=torch.int32, device="cuda") if keep else None
    return lambda: lm_head.chunk(index, slice(0, len(hidden)), live) and None


def time_products() -> dict[str, Any]:
    """The two backward products alone, of a chunk that fills its budget, beside cuBLAS."""
    found: list[dict[str, Any]] = []
    for depth, vocab in (gpu_sizes.SIZES.small_head, gpu_sizes.SIZES.large_head):
        hidden, weight, targets = random_head(gpu_sizes.SIZES.many_rows, vocab, depth)
        rows = min(head.Head(hidden, weight, None, targets, 1.0).rows, len(hidden))
        table = timed_table(
            _products(hidden[:rows].clone(), weight, targets[:rows], rows),
            flop_count=2 * rows * vocab * depth,
        )
        found += [row | {"what": f"H={depth} C={rows} {row['what']}"} for row in table["rows"]]
    return {"rows": found}


def _products(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int
) -> Variants:
    (vocab, depth), device = weight.shape, weight.device
    exps = torch.rand(rows, vocab, device=device, dtype=weight.dtype)
    ones = torch.ones(rows, device=device)
    index = torch.arange(rows, device=device)
    counts = {
        "": torch.full((1,), rows, dtype=torch.int32, device=device),
        ", half of the rows": torch.full((1,), rows // 2, dtype=torch.int32, device=device),
    }
    d_hidden, single = torch.empty_like(hidden), torch.empty(rows, depth, device=device)
    d_weight = torch.zeros(vocab, depth, device=device)
    variants: Variants = {}
    for label, live in counts.items():
        variants[f"hidden, triton{label}"] = lambda live=live: hidden_product(
            exps, weight, weight, live, None, ones, ones, index, targets, d_hidden
        )
        variants[f"weight, triton{label}"] = lambda live=live: weight_product(
            exps, hidden, live, None, d_weight, add=True
        )
    variants["hidden, cuBLAS to fp32"] = lambda: product(exps, weight, single)
    variants["weight, cuBLAS, added to fp32"] = lambda: torch.addmm(
        d_weight, exps.T, hidden, out_dtype=torch.float32, out=d_weight
    )
    return variants
