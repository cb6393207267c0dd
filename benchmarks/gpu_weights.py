"""Sections of the GPU suite: all weights of a 1.5B and a 7B model to an engine's layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_sizes, weight_copies
from benchmarks.gpu_timing import interleave
from benchmarks.timing import Variants, copy_rate
from polymath_fast.kernels import SegmentTable, dispatch, weight_sync

IMPLEMENTATIONS = ("cuda", "triton")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def correct() -> dict[str, Any]:
    """Every tensor of a 0.5B model, bit for bit, by each implementation; and slices of columns.

    Where csrc is not compiled the others are checked; the tables of times say what is missing.
    """
    values = {}
    compiled = dispatch.library_path("weight_sync").is_file()
    implementations = [i for i in IMPLEMENTATIONS if compiled or i != "cuda"]
    for name, dtype in DTYPES.items():
        _, pairs = weight_copies.tensors(gpu_sizes.SIZES.checked_model, dtype, "cuda")
        for source, target in list(pairs):
            if source.ndim == 2:
                half = source.shape[1] // 2
                pairs.append((source[:, half:], torch.zeros_like(target[:, half:])))
        for implementation in implementations:
            for _, target in pairs:
                target.zero_()
            weight_sync(_table_of(pairs), impl=implementation)
            wrong = weight_copies.wrong_tensors(pairs)
            values[f"{name} to bf16, {implementation}, wrong tensors"] = wrong
    failed = {name: wrong for name, wrong in values.items() if wrong}
    return {"values": values} | ({"error": f"wrong: {failed}"} if failed else {})


def time_small() -> dict[str, Any]:
    """Qwen2.5-1.5B's shapes."""
    return _time(gpu_sizes.SIZES.small_model)


def time_large() -> dict[str, Any]:
    """Qwen2.5-7B's shapes."""
    return _time(gpu_sizes.SIZES.large_model)


def _time(family: str) -> dict[str, Any]:
    """Times, as a share of what as many bytes take in one plain copy."""
    rate = copy_rate("cuda")
    rows: list[dict[str, Any]] = []
    for name, dtype in DTYPES.items():
        _, pairs = weight_copies.tensors(family, dtype, "cuda")
        table = _table_of(pairs)
        variants: Variants = {i: partial(weight_sync, table, impl=i) for i in IMPLEMENTATIONS} | {
            "loop of copy_": weight_copies.loop(pairs),
            "buckets": weight_copies.buckets(pairs),
            "foreach copy": _foreach(pairs),
        }
        for variant, timing in interleave(variants, launches=True).items():
            row = {"what": f"{name} to bf16 {variant}", "bytes": table.bytes} | timing.row()
            if timing.median is not None:
                row["share"] = 1e3 * table.bytes / rate / timing.median
            rows.append(row)
        del pairs, table, variants
        torch.cuda.empty_cache()
    return {"rows": rows}


def _table_of(pairs: weight_copies.Pairs) -> SegmentTable:
    return SegmentTable(*(list(side) for side in zip(*pairs, strict=True)))


def _foreach(pairs: weight_copies.Pairs) -> Callable[[], None]:
    sources: list[Tensor] = [source for source, _ in pairs]
    targets: list[Tensor] = [target for _, target in pairs]
    return lambda: torch._foreach_copy_(targets, sources)
