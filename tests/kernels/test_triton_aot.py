"""Every Triton kernel compiles for three generations of GPUs, and uses what the table says.

`python tests/kernels/test_triton_aot.py` writes the table; run it after a change of a kernel, and
read the difference before committing it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from polymath_fast.kernels.layer_rows import _triton as layers  # noqa: E402
from polymath_fast.kernels.triton import layer_kernels  # noqa: E402
from polymath_fast.kernels.triton.aot import Variant, compile_variant, resources  # noqa: E402
from polymath_fast.kernels.triton.layer_registry import layer_variants  # noqa: E402
from polymath_fast.kernels.triton.registry import variants  # noqa: E402

TABLE = Path(__file__).with_name("resources.json")
VARIANTS = {variant.name: variant for variant in variants()}
EVERY = [(name, cap) for name, variant in VARIANTS.items() for cap in variant.capabilities]
FEW = {
    "statistics-bf16",
    "slopes-bf16-odd",
    "slopes-bf16-bonus",
    "fused-bf16-1",
    "fused-bf16-bonus-2",
    "exp-gemm-hopper-descriptors-store",
    "exp-gemm-hopper-descriptors-store-flat",
    "exp-gemm-hopper-descriptors-store-odd",
    "exp-gemm-any-pointers-store-odd",
    "exp-gemm-ampere-pointers-store",
    "hidden-gemm-hopper-descriptors",
    "hidden-gemm-ampere-pointers",
    "weight-gemm-hopper-descriptors",
    "weight-gemm-hopper-descriptors-some",
    "some-columns-bf16",
    "finish",
    "target-sums-bias",
    "scaled-rows-bf16",
    "group-advantages-batch",
    "offsets-i32",
    "attention-forward-hopper-bf16-128",
    "attention-query-hopper-bf16-64-tree",
    "attention-key-hopper-bf16-64",
    "weight-sync-fp32-bf16",
    "flat-adamw-bf16",
    "flat-adamw-bf16-remainder-zero",
    "grad-norm",
    "rms-norm-bf16-1536",
    "rms-norm-gradient-bf16-1536",
    "rotate-bf16-12-2-128",
    "rotate-gradient-bf16-12-2-128",
    "rotate-gradient-bf16-32-8-128",
    "swiglu-gradient-bf16",
}
"""what is compiled in every run of the tests; the rest is marked slow"""
MATRIX_UNIT = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SMALL_LIMIT = 99 * 1024
"""shared memory of the smaller GPUs of a generation, which take the "small" tiles"""


def row(variant: Variant, capability: int) -> dict[str, int | str]:
    return resources(compile_variant(variant, capability))


def pytest_params() -> list:
    return [
        pytest.param(name, cap, id=f"{name}-sm{cap}", marks=() if name in FEW else pytest.mark.slow)
        for name, cap in EVERY
    ]


@pytest.mark.skipif(not triton.__version__.startswith("3.6"), reason="the table is of Triton 3.6")
@pytest.mark.parametrize(("name", "capability"), pytest_params())
def test_compiles_to_what_the_table_says(name: str, capability: int) -> None:
    expected = json.loads(TABLE.read_text())[name][f"sm_{capability}"]
    assert row(VARIANTS[name], capability) == expected


def test_the_table_lists_every_variant() -> None:
    table = json.loads(TABLE.read_text())
    listed = [(name, int(key[3:])) for name, by_arch in table.items() for key in by_arch]
    assert sorted(listed) == sorted(EVERY)


@pytest.mark.parametrize(("name", "capability"), EVERY)
def test_the_table_shows_no_spill_and_the_right_matrix_unit(name: str, capability: int) -> None:
    entry = json.loads(TABLE.read_text())[name][f"sm_{capability}"]
    assert entry["stack"] == 0 and entry["local"] == 0
    variant = VARIANTS[name]
    assert entry["registers"] * variant.warps * 32 * variant.programs <= 65536
    assert entry["shared"] <= (SMALL_LIMIT if "-small-" in name else SHARED_LIMIT[capability])
    if variant.matrix is None:
        assert entry["matrix"] in MATRIX_UNIT.values()
    else:
        assert entry["matrix"] == (MATRIX_UNIT[capability] if variant.matrix else "")


@pytest.mark.parametrize("counts", [(9, 3, 64), (28, 4, 128), (32, 8, 128)], ids=str)
def test_layers_are_launched_as_they_are_listed(
    counts: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warps and constants of the rotation, whose table says nothing about any others."""
    *heads, size = counts
    normed, launched = counts == (32, 8, 128), []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *given, num_warps, **constants: launched.append((num_warps, constants))

    for name in ("rotate_kernel", "rotate_gradient_kernel"):
        monkeypatch.setattr(layers, name, Kernel())
    row = torch.zeros(1, sum(heads) + heads[1], size)
    angle = (tuple(heads), row[:, 0], row[:, 0], 2 * (row[0, 0] if normed else None,), 1e-6)
    layers.rotate(row, *angle, row.clone() if normed else row)
    layers.rotate_gradient(row, *angle, row.split([*heads, heads[1]], 1), row.clone())
    for kernel, (warps, constants) in zip(
        (layer_kernels.rotate_kernel, layer_kernels.rotate_gradient_kernel), launched, strict=True
    ):
        listed = [
            variant.warps
            for variant in layer_variants()
            if variant.kernel is kernel and constants.items() <= variant.constants.items()
        ]
        assert set(listed) == {warps}


def test_few_are_all_there() -> None:
    assert set(VARIANTS) >= FEW


def test_tensor_lengths_do_not_recompile() -> None:
    """Numbers of rows are never specialised: neither 1 nor multiples of 16 make a new kernel."""
    for variant in VARIANTS.values():
        kernel = variant.kernel
        for name in ("count", "rows"):
            if name in kernel.arg_names:
                parameter = kernel.params[kernel.arg_names.index(name)]
                assert parameter.do_not_specialize or parameter.is_constexpr, (variant.name, name)


def test_any_vocabulary_is_stored_in_vectors() -> None:
    """Also one that is no multiple of 16."""
    variant = VARIANTS["exp-gemm-hopper-descriptors-store"]
    odd = replace(variant, types=variant.types | {"vocab": "i32"})
    ptx = compile_variant(odd, 90).asm["ptx"]
    assert "st.global.v4.b32" in ptx and "st.global.b16" not in ptx


def write_table() -> None:
    table: dict[str, dict[str, dict[str, int | str]]] = {}
    for name, capability in EVERY:
        table.setdefault(name, {})[f"sm_{capability}"] = row(VARIANTS[name], capability)
        print(name, capability, table[name][f"sm_{capability}"], flush=True)
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(write_table())
