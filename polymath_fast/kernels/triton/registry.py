"""Every kernel in every way the launchers call it, for checks ahead of time.

Pointers and strides are those of aligned tensors; "odd" variants are what anything else gets. A
launcher that passes something new belongs here too: `test_triton_aot.py` compiles this list for
compute capability 8.0, 9.0 and 10.0 and compares registers and shared memory with a table.
"""

from __future__ import annotations

from collections.abc import Iterator

from polymath_fast.kernels.group_advantages import _triton as advantages
from polymath_fast.kernels.triton import offsets, row_kernels, rows
from polymath_fast.kernels.triton.adamw_variants import adamw_variants
from polymath_fast.kernels.triton.aot import Variant
from polymath_fast.kernels.triton.attention_registry import attention_variants
from polymath_fast.kernels.triton.gradient_registry import gradient_variants
from polymath_fast.kernels.triton.head_registry import head_variants
from polymath_fast.kernels.triton.layer_registry import layer_variants
from polymath_fast.kernels.triton.scaling import scale_kernel
from polymath_fast.kernels.weight_sync import _triton as sync

_FLOATS = {"bf16": 8, "fp16": 8, "fp32": 4}
"""Triton's dtype -> entries in 16 bytes"""
_FP32, _INT64, _SIZE = "*fp32:16", "*i64:16", "i32:16"


def variants() -> Iterator[Variant]:
    """The list."""
    for dtype, width in _FLOATS.items():
        yield from _row_variants(dtype, width)
    yield from head_variants()
    yield from gradient_variants()
    for scale in ("group", "batch", "none"):
        yield _advantages(scale)
    for dtype in ("i32", "i64"):
        yield _offsets(dtype)
    yield from attention_variants()
    for src, dst in (("fp32", "bf16"), ("bf16", "bf16"), ("fp32", "fp16"), ("bf16", "fp16")):
        yield _weight_sync(src, dst)
    yield from adamw_variants()
    yield from layer_variants()


def _row_variants(dtype: str, width: int) -> Iterator[Variant]:
    types = {
        "logits_ptr": f"*{dtype}:16",
        "targets_ptr": _INT64,
        "found_ptr": _FP32,
        "index_ptr": _INT64,
        "note_ptr": _INT64,
        "g_ptr": _FP32,
        "g_entropy_ptr": _FP32,
        "out_ptr": f"*{dtype}:16",
        "stride_n": _SIZE,
        "out_stride_n": _SIZE,
        "vocab": _SIZE,
        "count": "i32",
        "temperature": "fp32",
    }
    odd = types | {"logits_ptr": f"*{dtype}", "stride_n": "i32", "vocab": "i32"}
    odd |= {"out_ptr": f"*{dtype}", "out_stride_n": "i32"}
    any_steps = odd | {"stride_v": "i32", "out_ptr": _FP32}
    small = {"LANES": rows.LANES, "WIDTH": width}
    near, nearby = {"stride_v": 1}, {"stride_v": 1, "out_stride_v": 1}
    alone = {"index_ptr": None}
    statistics = {"out_ptr": _FP32}
    yield Variant(
        f"statistics-{dtype}",
        row_kernels.statistics_kernel,
        types | statistics,
        small | near | alone,
    )
    for suffix, some, step in (("odd", odd | statistics, near), ("strided", any_steps, {})):
        yield Variant(
            f"statistics-{dtype}-{suffix}",
            row_kernels.statistics_kernel,
            some,
            small | step | alone,
        )
    for bonus in (False, True):
        flags = {"BONUS": bonus} | ({} if bonus else {"g_entropy_ptr": None})
        suffix = f"{dtype}-bonus" if bonus else dtype
        yield Variant(
            f"slopes-{suffix}", row_kernels.slopes_kernel, types, small | nearby | flags, rows.WARPS
        )
        yield Variant(
            f"slopes-{suffix}-odd",
            row_kernels.slopes_kernel,
            odd,
            small | nearby | flags,
            rows.WARPS,
        )
        for way in (rows.FUSED_ONE, rows.FUSED_TWO):
            for cut in (False, True):
                yield Variant(
                    f"fused-{suffix}-{way.programs}" + "-cut" * cut,
                    row_kernels.fused_kernel,
                    types | ({"vocab": "i32"} if cut else {}),
                    {"LANES": way.lanes, "WIDTH": width} | nearby | flags,
                    way.warps,
                    programs=way.programs,
                    registers=rows.FUSED_REGISTERS,
                )
    if dtype == "fp32":
        # logits of the head of fp16 and fp32 inputs
        yield Variant(
            "statistics-fp32-of-head",
            row_kernels.statistics_kernel,
            types | statistics,
            small | near,
        )
    else:
        # probabilities of fp32 logits, as the head of fp16 inputs makes them
        out = {"logits_ptr": _FP32, "out_ptr": f"*{dtype}:16"}
        yield Variant(
            f"slopes-fp32-to-{dtype}",
            row_kernels.slopes_kernel,
            types | out,
            {"LANES": rows.LANES, "WIDTH": 4, "BONUS": False, "g_entropy_ptr": None} | nearby,
        )
    if dtype == "fp32":
        yield Variant("targets", row_kernels.targets_kernel, types, {"BLOCK": 1024})
    scale = {"x_ptr": f"*{dtype}:16", "factor_ptr": _FP32, "stride": _SIZE, "columns": _SIZE}
    scale["count"] = "i64"
    yield Variant(f"scale-{dtype}", scale_kernel, scale, {"BLOCK": 4096})


def _advantages(scale: str) -> Variant:
    types = {
        "rewards_ptr": "*fp32:16",
        "groups_ptr": _INT64,
        "out_ptr": _FP32,
        "count": "i32",
        "eps": "fp32",
    }
    constants = {
        "BY_GROUP": scale == "group",
        "BY_BATCH": scale == "batch",
        "OTHERS": scale == "none",
        "ROWS": advantages.ROWS,
        "COLUMNS": advantages.COLUMNS,
    }
    return Variant(f"group-advantages-{scale}", advantages.advantages_kernel, types, constants)


def _offsets(dtype: str) -> Variant:
    types = {
        "cu_ptr": f"*{dtype}:16",
        "note_ptr": _INT64,
        "out_ptr": _INT64,
        "sound_ptr": _FP32,
        "offsets": "i32",
        "count": "i32",
    }
    return Variant(f"offsets-{dtype}", offsets.offsets_kernel, types, {"BLOCK": offsets.BLOCK})


def _weight_sync(src: str, dst: str) -> Variant:
    by_name = {value.name: value for value in sync.TYPES.values()}
    constants = {"SRC": by_name[src], "DST": by_name[dst]}
    constants |= {"CHUNK": sync.CHUNK, "BLOCK": sync.BLOCK}
    types = {"table_ptr": _INT64, "segments": "i32"}
    return Variant(
        f"weight-sync-{src}-{dst}", sync.weight_sync_kernel, types, constants, sync.WARPS
    )
