"""Row passes of a decoder layer in Triton's interpreter, and layers that are made of them.

`test_triton_interpreter.py` runs this file.
"""

from __future__ import annotations

import pytest
import torch
from interpreter import interpret
from layer_checks import ROUNDING, Heads, compare_norm, compare_rotation, compare_swiglu
from triton_checks import TRUNCATION

from polymath_fast.kernels import dense, dispatch
from polymath_fast.kernels.layer_rows import _triton
from polymath_fast.kernels.triton import products
from polymath_fast.learner.packing import TrainingRow, pack
from polymath_fast.learner.policy import Policy
from polymath_fast.models import random_models

interpret()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU go to the kernels."""
    resolve = dispatch.resolve

    def chosen(op: str, *given: object) -> object:
        return _triton if op == "layer_rows" else resolve(op, *given)

    monkeypatch.setattr(dispatch, "resolve", chosen)
    monkeypatch.setitem(ROUNDING, BF16, TRUNCATION)


@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [(0, 8, FP32), (1, 2, FP32), (70, 96, FP32), (33, 576, BF16), (5, 64, FP16)],
)
def test_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    compare_norm("triton", rows, width, dtype)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("rows", "queries", "keys", "size", "dtype"),
    [
        (0, 2, 1, 4, FP32),
        (1, 1, 1, 2, FP32),
        (37, 3, 1, 20, FP32),
        (19, 9, 3, 64, BF16),
        (3, 4, 4, 8, FP16),
    ],
)
def test_rotation(rows, queries, keys, size, dtype, norms: bool) -> None:
    compare_rotation("triton", rows, Heads(queries, keys, size, norms), dtype)


@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [(0, 8, FP32), (1, 2, FP32), (3, 1500, FP32), (2, 2048, BF16), (3, 40, FP16)],
)
def test_swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    compare_swiglu("triton", rows, width, dtype)


@pytest.mark.parametrize(
    ("family", "in_place"), [("tiny-qwen2", True), ("tiny-qwen2", False), ("tiny-qwen3", True)]
)
def test_layers(family: str, in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states and gradients of fused layers against transformers' own."""
    monkeypatch.setattr(dense, "_add_on_cpu", dense._add_on_gpu)
    monkeypatch.setattr(products, "_adds_in_place", lambda *_: in_place)
    row = TrainingRow(
        prompt_ids=(1, 2, 3),
        token_ids=list(range(4, 41)),
        sampling_logprobs=[-1.0] * 37,
        advantage=1.0,
    )
    found = {}
    for fused in (True, False):
        policy = Policy.of(random_models.in_memory(family, "float32", "cpu"))
        assert policy.unfused is None
        sinks = dict.fromkeys(policy.model.parameters()) if fused else {}
        for weight in sinks:
            weight.gradient_sink = _sink(sinks, weight)
        for module in () if fused else policy.model.modules():
            module.__dict__.pop("forward", None)
        for _ in range(2):  # the second pass adds to what the first one left
            states = policy.hidden(pack([row]))
            states.square().sum().backward()
        gradients = [sinks.get(w) if w.grad is None else w.grad for w in policy.model.parameters()]
        assert not fused or any(total is not None for total in sinks.values())
        found[fused] = [states.detach(), *gradients]
    for ours, theirs in zip(found[True], found[False], strict=True):
        if theirs is None:  # the head is not the embedding, and nothing went through it
            continue
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def _sink(sinks: dict, weight: torch.Tensor):
    def opened() -> tuple[torch.Tensor, bool]:
        add = sinks[weight] is not None
        if not add:
            sinks[weight] = torch.full(weight.shape, torch.nan)
        return sinks[weight], add

    return opened
