"""Sections of the GPU suite: the update, decoder layers, group advantages, the head's log-probs.

The checks take a device, so that they run, and can be tested, without a GPU as well.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks import gpu_rivals, gpu_sizes, rivals
from benchmarks.case import relative_error
from benchmarks.gpu_head import random_head
from benchmarks.gpu_sections import GRADIENT_ERROR, gate, timed_table
from benchmarks.gpu_timing import interleave
from benchmarks.layer_passes import check_passes, layer_rows_case
from benchmarks.optimizer_pass import check_updates, flat_adamw_case
from benchmarks.timing import Variants
from polymath_fast.kernels import grad_norm, group_advantages, linear_logprobs, use
from polymath_fast.kernels.layer_rows import _triton as layer_passes

NORM_ERROR = 1e-6
"""relative; the norm is summed up in fp64 and rounded to fp32"""
ADVANTAGE_ERROR = 1e-6


def correct_optimizer(device: str = "cuda") -> dict[str, Any]:
    """`grad_norm`, and two updates of `flat_adamw`, against float64."""
    torch.manual_seed(0)
    grad = torch.randn(gpu_sizes.SIZES.checked_gradient, device=device)
    truth = torch.linalg.vector_norm(grad.double())
    with _ours(device):
        values = {"relative error of the norm": float((grad_norm(grad) - truth).abs() / truth)}
        updates = check_updates(device)
    found = gate(values, lambda _: NORM_ERROR)
    return found | {"values": found["values"] | {f"{n} error": e for n, e in updates.items()}}


def time_optimizer() -> dict[str, Any]:
    """2^28 weights: norm, clip and update beside torch's clip, fused AdamW and copy; the norm."""
    case = flat_adamw_case("cuda")
    rows = timed_table(case.variants, byte_count=lambda name: int(case.bytes_of(name)))["rows"]
    grad = torch.randn(case.shape["n"], device="cuda")
    norms: Variants = {
        "grad_norm": lambda: grad_norm(grad),
        "torch, vector_norm": lambda: torch.linalg.vector_norm(grad),
    }
    return {"rows": rows + timed_table(norms, byte_count=grad.nbytes)["rows"]}


def correct_layers(device: str = "cuda") -> dict[str, Any]:
    """The row passes of a decoder layer and their gradients, against float64."""
    with _ours(device):
        return {"values": {f"{name} error": x for name, x in check_passes(device).items()}}


def time_layers() -> dict[str, Any]:
    """All of them, forward and backward, N = 8192, beside eager PyTorch, torch.compile, Liger.

    And with fewer rows a program in the norm's gradient: 32 leave two programs a multiprocessor.
    """
    case = layer_rows_case("cuda")
    few: Variants = {
        f"ours, {rows} rows a program": partial(_with_rows, rows, case.variants["ours"])
        for rows in (16, 8)
    }
    return timed_table(case.variants | few, byte_count=int(case.bytes))


def _with_rows(rows: int, passes: Callable[[], object]) -> None:
    with mock.patch.object(layer_passes, "NORM_ROWS", rows):
        passes()


def correct_advantages(device: str = "cuda") -> dict[str, Any]:
    """Every scale and baseline against the reference in float64; equal rewards give exactly 0."""
    rewards, groups = _rewards(device)
    rewards[groups == 1] = 0.1
    values, equal = {}, 0.0
    for scale in ("group", "batch", "none"):
        for baseline in ("mean", "leave_one_out"):
            how = {"scale": scale, "baseline": baseline}
            with _ours(device):
                found = group_advantages(rewards, groups, **how)
            truth = group_advantages(rewards.double(), groups, impl="reference", **how)
            values[f"{scale}, {baseline} error"] = float((found - truth).abs().max())
            equal = max(equal, float(found[groups == 1].abs().max()))
    held = gate(values, lambda _: ADVANTAGE_ERROR)
    return held | ({"error": f"equal rewards give {equal}, not 0"} if equal else {})


def time_advantages() -> dict[str, Any]:
    """2,048 completions in groups of 128: launches, not bytes, are what it takes."""
    rewards, groups = _rewards("cuda")
    variants: Variants = {
        "triton": lambda: group_advantages(rewards, groups, impl="triton"),
        "reference": lambda: group_advantages(rewards, groups, impl="reference"),
        "torch, equal groups": rivals.group_advantages(rewards, gpu_sizes.SIZES.group)["eager"],
    }
    timings = interleave(variants, launches=True)
    return {"rows": [{"what": name} | timing.row() for name, timing in timings.items()]}


def correct_head_logprobs(
    device: str = "cuda", rows: int | None = None, head: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Gradients of `linear_logprobs`, in one chunk and with rows that have none, against fp32."""
    rows = rows or gpu_sizes.SIZES.checked_rows
    depth, vocab = head or gpu_sizes.SIZES.small_head
    hidden, weight, targets = random_head(rows, vocab, depth, device)
    g, g_entropy = torch.randn(2, rows, device=device).unbind()
    g[::3] = g_entropy[::3] = 0
    found = []
    for dtype, impl in ((torch.bfloat16, "auto"), (torch.float32, "reference")):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
        with _ours(device):
            outputs = linear_logprobs(*leaves, targets, impl=impl)
            found.append(torch.autograd.grad(outputs, leaves, (g, g_entropy)))
    values = {}
    for name, ours, truth in zip(("hidden", "weight"), *found, strict=True):
        values[f"{name} gradient error"] = relative_error(ours, truth)
    return gate(values, lambda _: GRADIENT_ERROR)


def time_head_logprobs() -> dict[str, Any]:
    """N = 8192, H = 1536, V = 151936: forward alone, and with gradients."""
    rows, (depth, vocab) = gpu_sizes.SIZES.rows, gpu_sizes.SIZES.small_head
    hidden, weight, targets = random_head(rows, vocab, depth)
    nothing = torch.zeros(rows, device="cuda")
    data = rivals.HeadData(
        hidden, weight, targets, nothing[: rows // gpu_sizes.SIZES.length], nothing
    )
    work = 2 * rows * vocab * depth

    def forward() -> None:
        with torch.no_grad():
            linear_logprobs(hidden, weight, targets, impl="triton")

    alone = timed_table({"triton": forward} | gpu_rivals.head_logprobs(data), flop_count=work)
    heads: dict[str, rivals.Head] = {
        "triton": lambda *leaves: linear_logprobs(*leaves, targets, impl="triton")[0],
        "eager": lambda x, w: rivals.chosen_logprobs(torch.nn.functional.linear(x, w), targets),
    } | gpu_rivals.fused_heads(targets)
    both: Variants = {name: partial(_backward, data, head) for name, head in heads.items()}
    trained = timed_table(both, flop_count=3 * work, repeats=5)
    first = [row | {"what": f"forward, {row['what']}"} for row in alone["rows"]]
    return {"rows": first + [row | {"what": f"both, {row['what']}"} for row in trained["rows"]]}


def _backward(data: rivals.HeadData, head: rivals.Head) -> None:
    head(*data.leaves()).sum().backward()


def _ours(device: str) -> AbstractContextManager[None]:
    """On a GPU nothing may choose the reference, and be compared with itself."""
    return use("triton") if device == "cuda" else nullcontext()


def _rewards(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) rewards of 0 and 1, and group ids."""
    torch.manual_seed(0)
    count = gpu_sizes.SIZES.completions
    groups = torch.arange(count, device=device) // gpu_sizes.SIZES.group
    return torch.randint(0, 2, (count,), device=device).float(), groups
