"""Flat AdamW in every way its launchers call it; see `registry`."""

from __future__ import annotations

from collections.abc import Iterator

from polymath_fast.kernels.flat_adamw import _triton as adamw
from polymath_fast.kernels.triton.aot import Variant

_FP32 = "*fp32:16"


def adamw_variants() -> Iterator[Variant]:
    """Each live dtype, with and without clearing the gradient, and the norm."""
    names = ("master_ptr", "m_ptr", "v_ptr", "grad_ptr", "numbers_ptr")
    types = {name: _FP32 for name in names} | {"segments_ptr": "*i64:16", "count": "i32"}
    types |= {name: "fp32" for name in ("beta1", "rest1", "beta2", "rest2", "eps")}
    lives = {"bf16": "*i16:16", "bf16-remainder": "*i16:16", "fp16": "*fp16:16", "fp32": _FP32}
    for name, live in lives.items():
        remainder = name == "bf16-remainder"
        given = types | {"live_ptr": live} | ({"master_ptr": "*i16:16"} if remainder else {})
        for zero in (False, True):
            yield Variant(
                f"flat-adamw-{name}" + "-zero" * zero,
                adamw.update_kernel,
                given,
                {"REMAINDER": remainder, "ZERO": zero, "BLOCK": adamw.BLOCK},
                adamw.WARPS,
            )
    yield Variant(
        "grad-norm",
        adamw.squares_kernel,
        {"grad_ptr": _FP32, "out_ptr": "*fp64:16", "count": "i32"},
        {"BLOCK": adamw.NORM_BLOCK, "STEPS": adamw.NORM_STEPS},
        adamw.NORM_WARPS,
    )
