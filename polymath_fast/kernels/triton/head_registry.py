"""Every kernel of the LM head and of its backward products, in every way the launchers call it."""

from __future__ import annotations

from collections.abc import Iterator

from polymath_fast.kernels.triton import head_kernels, product_kernels
from polymath_fast.kernels.triton.aot import Variant
from polymath_fast.kernels.triton.tiles import BACKWARD_TILES, FLATTENING, TILES, Tiles

_KINDS = {"hopper": (90, 100), "ampere": (80,), "small": (80,), "any": (80, 90, 100)}
"""tiles -> compute capabilities they are compiled for"""
_FP32, _INT64, _SIZE = "*fp32:16", "*i64:16", "i32:16"


_WAYS = {
    "hopper": ((True, False), (True, True)),
    "ampere": ((False, False),),
    "small": ((False, False),),
    "any": ((False, True),),
}
"""tiles -> descriptors, and sizes, steps and addresses that are no multiples of 16: without
descriptors newer GPUs have nothing else"""


def head_variants() -> Iterator[Variant]:
    """The list."""
    yield from _forward_variants()
    yield from _product_variants()


def _forward_variants() -> Iterator[Variant]:
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
        for descriptors, odd in _WAYS[kind]:
            tiles = TILES["odd" if kind == "any" else kind]
            matrices = {"hidden": "*bf16:16", "weight": "*bf16:16"}
            if descriptors:
                matrices = {
                    "hidden": f"tensordesc<bf16[{tiles.m}, {tiles.k}]>",
                    "weight": f"tensordesc<bf16[{tiles.n}, {tiles.k}]>",
                }
            given = _odd(types | matrices, descriptors) if odd else types | matrices
            for store, others, again, bias, flat in _EXP_FLAGS:
                # with a bias and an odd vocabulary 48 bytes spill on 10.0: no model has both
                if (flat and not descriptors) or (odd and bias and descriptors):
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
                flags |= {"flat": flat, "odd": odd}
                words += [word for word, on in flags.items() if on]
                yield Variant(
                    "exp-gemm-" + "-".join(words),
                    head_kernels.exp_gemm_kernel,
                    given,
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


def _odd(types: dict[str, str], descriptors: bool) -> dict[str, str]:
    """Of an odd vocabulary and, where addresses are computed, of any matrices."""
    sizes = {"vocab", "columns"}
    if not descriptors:
        sizes |= {
            "depth",
            "stride_hidden",
            "stride_weight",
            "stride_scaled",
            "stride_head",
            "stride_out",
        }
        sizes |= {"hidden", "weight", "head_ptr", "bias_ptr"}
    return {n: kind.removesuffix(":16") if n in sizes else kind for n, kind in types.items()}


def _product_variants() -> Iterator[Variant]:
    for kind in _KINDS:
        for descriptors, odd in _WAYS[kind]:
            for some in (False, True):
                if not (some and odd and descriptors):  # the choice's columns are a multiple of 128
                    yield from _products("bf16", kind, descriptors, some, odd)
    yield from _products("fp16", "hopper", True, False, False)


def _products(dtype: str, kind: str, descriptors: bool, some: bool, odd: bool) -> Iterator[Variant]:
    """Both backward products."""
    tiles = BACKWARD_TILES["odd" if kind == "any" else kind]
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
    words += [dtype] * (dtype != "bf16") + ["odd"] * odd
    if odd:
        types = _odd(types, descriptors)

    def operands(**shapes: tuple[int, int]) -> dict[str, str]:
        if not descriptors:
            return {name: f"*{dtype}" + ":16" * (not odd) for name in shapes}
        return {name: f"tensordesc<{dtype}[{m}, {n}]>" for name, (m, n) in shapes.items()}

    how = {"warps": tiles.warps, "stages": tiles.stages, "capabilities": _KINDS[kind]}
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
