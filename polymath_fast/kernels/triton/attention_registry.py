"""The attention kernels in the ways `prefix_attention/_triton.py` calls them, for `registry`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from polymath_fast.kernels.prefix_attention._triton import DELTA_ROWS, SUM_ROWS
from polymath_fast.kernels.triton import attention_gradient_kernels, attention_kernels
from polymath_fast.kernels.triton.aot import Variant
from polymath_fast.kernels.triton.attention_tiles import Way, fitting, width_of

_CAPABILITIES = {"hopper": (90, 100), "small": (80,), "single": (80, 90)}
_DEPTHS = {
    ("hopper", "bf16"): (64, 80, 128, 256),
    ("small", "bf16"): (64, 80, 128, 256),
    ("single", "fp32"): (64, 128),
}
"""kind of tiles and dtype -> entries of a head; fp16 takes what bf16 does"""
_KERNELS = (
    ("forward", attention_kernels.attention_kernel, False),
    ("forward", attention_kernels.attention_kernel, True),
    ("query", attention_gradient_kernels.query_gradient_kernel, False),
    ("query", attention_gradient_kernels.query_gradient_kernel, True),
    ("key", attention_gradient_kernels.key_gradient_kernel, None),
)
"""what a program owns, its kernel, and whether segments are in a tree, where that matters"""


def attention_variants() -> Iterator[Variant]:
    """The list."""
    for (kind, dtype), depths in _DEPTHS.items():
        for depth in depths:
            tiles = fitting(kind, depth)
            for name, kernel, tree in _KERNELS:
                way = getattr(tiles, name)
                # of fp32 and of tiles of 32 rows the newest units take no products
                matrix = None if dtype == "fp32" or (kind, name, depth) == _NARROW else True
                yield Variant(
                    f"attention-{name}-{'small' if kind == 'single' else kind}-{dtype}-{depth}"
                    + "-tree" * bool(tree),
                    kernel,
                    _types(dtype),
                    _constants(depth, way) | ({} if tree is None else {"TREE": tree}),
                    way.warps,
                    way.stages,
                    _CAPABILITIES[kind],
                    matrix=matrix,
                )
    for dtype, depth in (("bf16", 128), ("fp32", 128)):
        shape = {"DEPTH": depth, "WIDTH": width_of(depth)}
        yield Variant(
            f"attention-delta-{dtype}-{depth}",
            attention_kernels.delta_kernel,
            _types(dtype),
            shape | {"QUERIES": DELTA_ROWS},
        )
        yield Variant(
            f"attention-sum-{dtype}-{depth}",
            attention_gradient_kernels.sum_slots_kernel,
            _types(dtype),
            shape | {"KEYS": 64, "ROWS": SUM_ROWS},
        )


_NARROW = ("hopper", "key", 256)


def _constants(depth: int, way: Way) -> dict[str, Any]:
    sizes = {"QUERIES": way.queries, "KEYS": way.keys}
    return sizes | {"DEPTH": depth, "WIDTH": width_of(depth), "WIDEN": False}


def _types(dtype: str) -> dict[str, str]:
    matrices = ("q", "k", "v", "out", "grad", "d_q", "d_k", "d_v")
    strides = [f"stride_{name}{head}" for name in matrices[:5] for head in ("", "_head")]
    return (
        {f"{name}_ptr": f"*{dtype}:16" for name in matrices}
        | dict.fromkeys(("lse_ptr", "delta_ptr", "slots_ptr"), "*fp32:16")
        | dict.fromkeys(("last_ptr", "queries_ptr", "runs_ptr", "units_ptr", "sums_ptr"), "*i32:16")
        | dict.fromkeys(("rows", "heads", "kv_heads", "group"), "i32")
        | dict.fromkeys(("factor", "scale"), "fp32")
        | dict.fromkeys(strides, "i32:16")
    )
