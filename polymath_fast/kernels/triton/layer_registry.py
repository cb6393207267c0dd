"""The row passes of a decoder layer in every way their launchers call them; see `registry`.

Sizes are compile-time constants: those of SmolLM2-135M, Qwen2.5-1.5B and 7B, and of Qwen3-8B, whose
heads have norms.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton

from polymath_fast.kernels.layer_rows import _triton as layers
from polymath_fast.kernels.triton import layer_kernels as kernels
from polymath_fast.kernels.triton.aot import Variant

_HIDDEN = (576, 1536, 3584, 4096)
_HEADS = {"9-3-64": (9, 3, 64), "12-2-128": (12, 2, 128), "28-4-128": (28, 4, 128)}
_NORMED = {"32-8-128": (32, 8, 128)}
_POINTERS = (
    *("x_ptr", "weight_ptr", "out_ptr", "upstream_ptr", "residual_ptr", "stacked_ptr", "raw_ptr"),
    *("cos_ptr", "sin_ptr", "q_norm_ptr", "k_norm_ptr", "d_q_ptr", "d_k_ptr", "d_v_ptr"),
    "gate_up_ptr",
)


def layer_variants() -> Iterator[Variant]:
    """Each pass in bf16 and fp32."""
    for dtype in ("bf16", "fp32"):
        types = {name: f"*{dtype}:16" for name in _POINTERS}
        types |= {"shares_ptr": "*fp32:16", "eps": "fp32", "count": "i32"}
        for width in _HIDDEN:
            yield from _norms(dtype, types, width)
        for name, heads in (_HEADS | _NORMED).items():
            yield from _rotations(f"{dtype}-{name}", types, heads, name in _NORMED)
        given = {"WIDTH": 8960, "BLOCK": layers.SWIGLU_BLOCK}
        for name, kernel in (
            (f"swiglu-{dtype}", kernels.swiglu_kernel),
            (f"swiglu-gradient-{dtype}", kernels.swiglu_gradient_kernel),
        ):
            yield Variant(name, kernel, types, given, layers.SWIGLU_WARPS)


def _norms(dtype: str, types: dict[str, str], width: int) -> Iterator[Variant]:
    given = {"WIDTH": width, "BLOCK": triton.next_power_of_2(width)}
    suffix, warps = f"{dtype}-{width}", layers.warps_for(width)
    yield Variant(f"rms-norm-{suffix}", kernels.rms_norm_kernel, types, given, warps)
    given = given | {"RESIDUAL": True, "ROWS": layers.NORM_ROWS}
    gradient = kernels.rms_norm_gradient_kernel
    yield Variant(f"rms-norm-gradient-{suffix}", gradient, types, given, warps)
    if width == _HIDDEN[0]:
        given = given | {"RESIDUAL": False, "residual_ptr": None}
        yield Variant(f"rms-norm-gradient-{suffix}-alone", gradient, types, given, warps)


def _rotations(
    suffix: str, types: dict[str, str], heads: tuple[int, int, int], normed: bool
) -> Iterator[Variant]:
    queries, keys, size = heads
    shape = layers.tile_of((queries, keys), size)
    entries = shape["HEADS"] * shape["HALF_BLOCK"]
    warps = layers.warps_for(entries, most=layers.ROTATE_WARPS)
    none = {} if normed else {"q_norm_ptr": None, "k_norm_ptr": None}
    given = shape | none | {"NORMS": normed, "COPY": normed}
    yield Variant(f"rotate-{suffix}", kernels.rotate_kernel, types, given, warps)
    none = none | ({} if normed else {"raw_ptr": None, "shares_ptr": None})
    given = shape | none | {"NORMS": normed, "ROWS": layers.HEAD_ROWS if normed else 1}
    gradient = kernels.rotate_gradient_kernel
    yield Variant(f"rotate-gradient-{suffix}", gradient, types, given, warps)
