"""prefix_attention on a GPU: real tiles, and what an interpreter or a stand-in cannot show."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from attention_checks import LAYOUTS, TREES, compare, make, offsets_of, run
from closeness import relative_error

from polymath_fast.kernels import dispatch, prefix_attention_blocks

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
REAL = {
    "ragged": [(151, [128, 1, 77, 0, 300, 64])],
    "long prompt": [(1030, [70] * 40)],
    "long completions": [(40, [1500, 700])],
    "several prompts": [(130, [200, 31]), (1, [1]), (64, [64] * 4), (257, [])],
}


def implementation(name: str):
    if name == "_flash" and not dispatch.has_flash_attn():
        pytest.skip("flash-attn is not installed")
    module = importlib.import_module(f"polymath_fast.kernels.prefix_attention.{name}")
    return module.prefix_attention


@pytest.mark.parametrize("layout", REAL.values(), ids=REAL)
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [*((BF16, d) for d in (64, 80, 128, 256)), (FP16, 128)], ids=str
)
@pytest.mark.parametrize("name", ["_triton", "_flash"])
def test_agrees_with_float64(name, dtype, head_dim, layout) -> None:
    compare(
        implementation(name),
        layout,
        heads=(6, 2),
        head_dim=head_dim,
        dtype=dtype,
        device="cuda",
        scale=head_dim**-0.5,
    )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ["_triton", "_flash"])
def test_awkward_layouts(name, layout) -> None:
    for alone in (False, True):
        compare(implementation(name), layout, head_dim=64, dtype=BF16, device="cuda", alone=alone)


@pytest.mark.parametrize("layout", TREES.values(), ids=TREES)
def test_trees(layout) -> None:
    for alone in (False, True):
        compare(
            implementation("_triton"), layout, head_dim=64, dtype=BF16, device="cuda", alone=alone
        )


def test_a_tree_of_full_tiles() -> None:
    layout = [(130, [300, 200, 77, 150, 260], [-1, 0, 0, 2, -1])]
    compare(implementation("_triton"), layout, head_dim=128, dtype=BF16, device="cuda", scale=0.1)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_float32(head_dim) -> None:
    compare(implementation("_triton"), REAL["ragged"], head_dim=head_dim, device="cuda")


@pytest.mark.parametrize("name", ["_triton", "_flash"])
def test_two_runs_are_bit_equal(name) -> None:
    layout = [(600, [300] * 64)]
    tensors = make(layout, (12, 2), 128, BF16, "cuda")
    first, second = (run(implementation(name), tensors, layout, 0.1) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_a_thousand_identical_completions() -> None:
    layout = [(100, [50] * 1024)]
    tensors = make(layout, (4, 2), 64, BF16, "cuda")
    for x in tensors:
        x[100:] = x[100:150].repeat(1024, 1, 1)
    out, d_q, *_ = run(implementation("_triton"), tensors, layout, 0.125)
    compare(implementation("_triton"), [(100, [50])], head_dim=64, dtype=BF16, device="cuda")
    for x in (out, d_q):
        every = x[100:].view(1024, 50, 4, 64)
        # tiles begin elsewhere in each of them
        assert relative_error(every, every[:1].expand_as(every)) < 4e-3


def test_nothing_waits_for_the_gpu() -> None:
    layout = [(130, [200, 31]), (64, [64] * 4)]
    q, k, v, grad = make(layout, (4, 2), 64, BF16, "cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    attend = implementation("_triton")
    run(attend, [q, k, v, grad], layout, 0.1)  # compiles
    blocks = offsets_of([(131, [200, 30]), (64, [64] * 4)])
    torch.cuda.set_sync_debug_mode("error")
    try:
        prefix_attention_blocks(*leaves, blocks, impl="triton").backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_new_lengths_do_not_compile() -> None:
    from polymath_fast.kernels.triton import attention_gradient_kernels, attention_kernels

    kernels = [
        attention_kernels.attention_kernel,
        attention_kernels.delta_kernel,
        attention_gradient_kernels.key_gradient_kernel,
        attention_gradient_kernels.query_gradient_kernel,
    ]
    compiled = []
    layouts = ([(16, [16] * 4)], [(1, [])], [(33, [7, 900])], [(5000, [100]), (3, [1])])
    for layout in layouts:
        tensors = make(layout, (4, 2), 64, BF16, "cuda")
        run(implementation("_triton"), tensors, layout, 0.125)
        heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors[:3]]
        prefix_attention_blocks(*heads_first, offsets_of(layout), impl="triton")
        caches = itertools.chain(*(kernel.device_caches.values() for kernel in kernels))
        compiled.append(sum(len(cache[0]) for cache in caches))
    assert len(set(compiled)) == 1
