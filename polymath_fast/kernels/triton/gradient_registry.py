"""Every kernel beside the products of the LM head's gradient, in every way it is launched."""

from __future__ import annotations

from collections.abc import Iterator

from polymath_fast.kernels.triton import gradient_kernels, vocabulary_kernels
from polymath_fast.kernels.triton.aot import Variant
from polymath_fast.kernels.triton.tiles import LIVE_STEP

_FP32, _INT64, _SIZE = "*fp32:16", "*i64:16", "i32:16"


def gradient_variants() -> Iterator[Variant]:
    """The list."""
    for dtype in ("bf16", "fp16", "fp32"):
        yield from _of_dtype(dtype)
    yield _target_sums(bias=False)
    yield _target_sums(bias=True)


def _of_dtype(dtype: str) -> Iterator[Variant]:
    types = {
        "d_ptr": f"*{dtype}:16",
        "hidden_ptr": f"*{dtype}:16",
        "weight_ptr": f"*{dtype}:16",
        "product_ptr": _FP32,
        "found_ptr": _FP32,
        "g_ptr": _FP32,
        "g_entropy_ptr": _FP32,
        "unit_ptr": _FP32,
        "live_ptr": "*i32:16",
        "width_ptr": "*i32:16",
        "a_ptr": _FP32,
        "b_ptr": _FP32,
        "index_ptr": _INT64,
        "targets_ptr": _INT64,
        "columns_ptr": _INT64,
        "rows_ptr": _INT64,
        "x_ptr": f"*{dtype}:16",
        "some_ptr": _FP32,
        "stride_x": _SIZE,
        "stride_d": _SIZE,
        "stride_hidden": _SIZE,
        "stride_weight": _SIZE,
        "stride_out": _SIZE,
        "vocab": _SIZE,
        "depth": _SIZE,
        "count": "i32",
    }
    out = {"out_ptr": f"*{dtype}:16"}
    kernels, choice = gradient_kernels, vocabulary_kernels
    yield Variant(f"bonus-{dtype}", kernels.bonus_kernel, types, {"BLOCK": 4096}, 8)
    rows_of = {"BLOCK": 1024}
    yield Variant(f"scaled-rows-{dtype}", kernels.scaled_rows_kernel, types | out, rows_of)
    sums = {"ROWS": 32, "BLOCK": 128}
    yield Variant(
        f"column-sums-{dtype}", kernels.column_sums_kernel, types | {"out_ptr": _FP32}, sums
    )
    masses = {"norms_ptr": _FP32, "peak_ptr": _FP32, "mass_ptr": _FP32, "lengths_ptr": _FP32}
    masses |= types | {"out_ptr": _FP32}
    yield Variant(f"column-masses-{dtype}", choice.column_masses_kernel, masses, sums)
    tile = {"ROWS": 8, "BLOCK": 256}
    yield Variant(f"row-masses-{dtype}", choice.row_masses_kernel, masses, tile)
    if dtype == "fp32":
        yield Variant("hidden-rows-fp32", kernels.hidden_rows_kernel, types | out, rows_of)
        return
    step = {"STEP": LIVE_STEP}
    columns = {"BLOCK": 512} | step
    yield Variant(f"some-columns-{dtype}", choice.some_columns_kernel, types | out, columns)
    yield Variant(f"some-rows-{dtype}", choice.some_rows_kernel, types | out, rows_of | step)
    if dtype == "bf16":
        yield Variant("add-rows", choice.add_rows_kernel, types | {"out_ptr": _FP32}, rows_of)


def _target_sums(bias: bool) -> Variant:
    types = {
        "hidden_ptr": "*bf16:16",
        "order_ptr": _INT64,
        "sorted_ptr": _INT64,
        "b_ptr": _FP32,
        "unit_ptr": _FP32,
        "d_weight_ptr": _FP32,
        "d_bias_ptr": _FP32,
        "stride_hidden": _SIZE,
        "depth": _SIZE,
        "vocab": _SIZE,
        "count": "i32",
    }
    constants = {"BIAS": bias, "BLOCK": 128, "ROWS": 16} | ({} if bias else {"d_bias_ptr": None})
    return Variant(
        "target-sums" + "-bias" * bias, gradient_kernels.target_sums_kernel, types, constants
    )
