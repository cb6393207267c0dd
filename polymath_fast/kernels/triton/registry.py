"""Every kernel in every way the launchers call it, for checks ahead of time.

Pointers and strides are those of aligned tensors; "odd" variants are what anything else gets. A
launcher that passes something new belongs here too: `test_triton_aot.py` compiles this list for
compute capability 8.0, 9.0 and 10.0 and compares registers and shared memory with a table.
"""

from __future__ import annotations

from collections.abc import Iterator

from polymath_fast.kernels.group_advantages import _triton as advantages
from polymath_fast.kernels.triton import (
    gradient_kernels,
    head_kernels,
    offsets,
    product_kernels,
    row_kernels,
    rows,
)
from polymath_fast.kernels.triton.adamw_variants import adamw_variants
from polymath_fast.kernels.triton.aot import Variant
from polymath_fast.kernels.triton.attention_registry import attention_variants
from polymath_fast.kernels.triton.scaling import scale_kernel
from polymath_fast.kernels.triton.tiles import (
    BACKWARD_TILES,
    FLATTENING,
    LIVE_STEP,
    TILES,
    Tiles,
)
from polymath_fast.kernels.weight_sync import _triton as sync

_FLOATS = {"bf16": 8, "fp16": 8, "fp32": 4}
"""Triton's dtype -> entries in 16 bytes"""
_KINDS = {"hopper": (90, 100), "ampere": (80,), "small": (80,)}
"""tiles -> compute capabilities they are compiled for"""
_FP32, _INT64, _SIZE = "*fp32:16", "*i64:16", "i32:16"


def variants() -> Iterator[Variant]:
    """The list."""
    for dtype, width in _FLOATS.items():
        yield from _row_variants(dtype, width)
        yield from _head_gradient_variants(dtype)
    yield from _head_variants()
    yield from _product_variants()
    yield _target_sums(bias=False)
    yield _target_sums(bias=True)
    for scale in ("group", "batch", "none"):
        yield _advantages(scale)
    for dtype in ("i32", "i64"):
        yield _offsets(dtype)
    yield from attention_variants()
    for src, dst in (("fp32", "bf16"), ("bf16", "bf16"), ("fp32", "fp16"), ("bf16", "fp16")):
        yield _weight_sync(src, dst)
    yield from adamw_variants()


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
    odd = types | {"logits_ptr": f"*{dtype}", "stride_n": "i32", "vocab": "i32", "stride_v": "i32"}
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
    yield Variant(
        f"statistics-{dtype}-odd", row_kernels.statistics_kernel, odd | statistics, small | alone
    )
    for bonus in (False, True):
        flags = {"BONUS": bonus} | ({} if bonus else {"g_entropy_ptr": None})
        suffix = f"{dtype}-bonus" if bonus else dtype
        yield Variant(
            f"slopes-{suffix}", row_kernels.slopes_kernel, types, small | nearby | flags, rows.WARPS
        )
        for way in (rows.FUSED_ONE, rows.FUSED_TWO):
            yield Variant(
                f"fused-{suffix}-{way.programs}",
                row_kernels.fused_kernel,
                types,
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


def _head_variants() -> Iterator[Variant]:
    types = {
        "bias_ptr": "*bf16:16",
        "targets_ptr": _INT64,
        "offset_ptr": _FP32,
        "again_ptr": "*i8:16",
        "any_ptr": "*i32:16",
        "index_ptr": _INT64,
        "note_ptr": _INT64,
        "live_ptr": "*i32:16",
        "exps_ptr": "*bf16:16",
        "partial_ptr": _FP32,
        "rows": "i32",
        "vocab": _SIZE,
        "depth": _SIZE,
        "stride_hidden": _SIZE,
        "stride_weight": _SIZE,
        "stride_exps": _SIZE,
        "temperature": "fp32",
    }
    for kind, capabilities in _KINDS.items():
        tiles = TILES[kind]
        for descriptors in (True, False) if kind == "hopper" else (False,):
            matrices = {"hidden": "*bf16:16", "weight": "*bf16:16"}
            if descriptors:
                matrices = {
                    "hidden": f"tensordesc<bf16[{tiles.m}, {tiles.k}]>",
                    "weight": f"tensordesc<bf16[{tiles.n}, {tiles.k}]>",
                }
            for store, others, again, bias, flat in _EXP_FLAGS:
                if flat and kind != "hopper":
                    continue
                constants = {
                    "BIAS": bias,
                    "STORE": store,
                    "OTHERS": others,
                    "AGAIN": again,
                    "FLATTEN": flat,
                    "DESCRIPTORS": descriptors,
                    "WIDEN": False,
                } | _blocks(tiles)
                constants |= {} if bias else {"bias_ptr": None}
                constants |= {} if store else {"exps_ptr": None, "live_ptr": None}
                constants |= {} if again else {"any_ptr": None}
                words = [kind, "descriptors" if descriptors else "pointers"]
                flags = {"store": store, "alone": not others, "again": again, "bias": bias}
                flags["flat"] = flat
                words += [word for word, on in flags.items() if on]
                yield Variant(
                    "exp-gemm-" + "-".join(words),
                    head_kernels.exp_gemm_kernel,
                    types | matrices,
                    constants,
                    tiles.warps,
                    tiles.stages,
                    FLATTENING if flat else capabilities,
                    matrix=True,
                )
    for bias in (False, True):
        target = types | {
            "hidden_ptr": "*bf16:16",
            "weight_ptr": "*bf16:16",
            "y_target_ptr": _FP32,
        }
        yield Variant(
            "target-logits" + "-bias" * bias,
            head_kernels.target_logits_kernel,
            target,
            {"BIAS": bias, "BLOCK": 1024} | ({} if bias else {"bias_ptr": None}),
        )
    finish = types | {"y_target_ptr": _FP32, "found_ptr": _FP32, "tiles": "i32"}
    for again in (False, True):
        for others in (False, True):
            yield Variant(
                "finish" + "-alone" * (not others) + "-again" * again,
                head_kernels.finish_kernel,
                finish,
                {"AGAIN": again, "OTHERS": others, "BLOCK_R": 32, "BLOCK_T": 32}
                | ({"live_ptr": None} if others else {}),
            )


_EXP_FLAGS = (
    (True, True, False, False, False),
    (True, True, True, False, False),
    (True, False, False, False, False),
    (True, False, True, False, False),
    (False, True, False, False, False),
    (True, True, False, True, False),
    (False, True, True, True, False),
    (True, True, False, False, True),
    (False, True, False, False, True),
)
"""store, others, again, bias, flat: the ways a step and a forward pass go, one of each with bias,
and those of a persistent product on Hopper"""


def _product_variants() -> Iterator[Variant]:
    for kind, capabilities in _KINDS.items():
        for descriptors in (True, False) if kind == "hopper" else (False,):
            for some in (False, True):
                yield from _products("bf16", kind, capabilities, descriptors, some)
    yield from _products("fp16", "hopper", _KINDS["hopper"], True, False)


def _products(
    dtype: str, kind: str, capabilities: tuple[int, ...], descriptors: bool, some: bool
) -> Iterator[Variant]:
    """Both backward products."""
    tiles = BACKWARD_TILES[kind]
    types = {
        "live_ptr": "*i32:16",
        "width_ptr": "*i32:16",
        "a_ptr": _FP32,
        "b_ptr": _FP32,
        "index_ptr": _INT64,
        "targets_ptr": _INT64,
        "head_ptr": f"*{dtype}:16",
        "rows": "i32",
        "columns": _SIZE,
        "depth": _SIZE,
        "stride_exps": _SIZE,
        "stride_weight": _SIZE,
        "stride_scaled": _SIZE,
        "stride_head": _SIZE,
        "stride_out": _SIZE,
    }
    flags = {"SOME": some, "DESCRIPTORS": descriptors, "WIDEN": False} | _blocks(tiles)
    flags |= {} if some else {"width_ptr": None}
    words = [kind, "descriptors" if descriptors else "pointers"] + ["some"] * some
    words += [dtype] * (dtype != "bf16")

    def operands(**shapes: tuple[int, int]) -> dict[str, str]:
        if not descriptors:
            return {name: f"*{dtype}:16" for name in shapes}
        return {name: f"tensordesc<{dtype}[{m}, {n}]>" for name, (m, n) in shapes.items()}

    how = {"warps": tiles.warps, "stages": tiles.stages, "capabilities": capabilities}
    yield Variant(
        "hidden-gemm-" + "-".join(words),
        product_kernels.hidden_gemm_kernel,
        types
        | {"out_ptr": f"*{dtype}:16"}
        | operands(exps=(tiles.m, tiles.k), weight=(tiles.k, tiles.n)),
        flags,
        matrix=True,
        **how,
    )
    yield Variant(
        "weight-gemm-" + "-".join(words),
        product_kernels.weight_gemm_kernel,
        types | {"out_ptr": _FP32} | operands(exps=(tiles.k, tiles.m), scaled=(tiles.k, tiles.n)),
        flags | {"ADD": not some},
        matrix=True,
        **how,
    )


def _blocks(tiles: Tiles) -> dict[str, int]:
    return {
        "BLOCK_M": tiles.m,
        "BLOCK_N": tiles.n,
        "BLOCK_K": tiles.k,
        "GROUP_M": tiles.group,
    }


def _head_gradient_variants(dtype: str) -> Iterator[Variant]:
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
    kernels = gradient_kernels
    yield Variant(f"bonus-{dtype}", kernels.bonus_kernel, types, {"BLOCK": 4096}, 8)
    rows_of = {"BLOCK": 1024}
    yield Variant(f"scaled-rows-{dtype}", kernels.scaled_rows_kernel, types | out, rows_of)
    sums = {"ROWS": 32, "BLOCK": 128}
    yield Variant(
        f"column-sums-{dtype}", kernels.column_sums_kernel, types | {"out_ptr": _FP32}, sums
    )
    masses = {"norms_ptr": _FP32, "peak_ptr": _FP32, "mass_ptr": _FP32, "lengths_ptr": _FP32}
    masses |= types | {"out_ptr": _FP32}
    yield Variant(f"column-masses-{dtype}", kernels.column_masses_kernel, masses, sums)
    tile = {"ROWS": 8, "BLOCK": 256}
    yield Variant(f"row-masses-{dtype}", kernels.row_masses_kernel, masses, tile)
    if dtype == "fp32":
        yield Variant("hidden-rows-fp32", kernels.hidden_rows_kernel, types | out, rows_of)
        return
    step = {"STEP": LIVE_STEP}
    columns = {"BLOCK": 512} | step
    yield Variant(f"some-columns-{dtype}", kernels.some_columns_kernel, types | out, columns)
    yield Variant(f"some-rows-{dtype}", kernels.some_rows_kernel, types | out, rows_of | step)
    if dtype == "bf16":
        yield Variant("add-rows", kernels.add_rows_kernel, types | {"out_ptr": _FP32}, rows_of)


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
