"""Sizes that the memory estimate is made of, against published ones and what autograd keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from memory_estimates import PUBLISHED

from polymath_fast import memory
from polymath_fast.kernels import linear_grpo_loss
from polymath_fast.kernels.cpu import head, head_gradient
from polymath_fast.kernels.linear_grpo_loss import footprint
from polymath_fast.learner.packing import TrainingRow, pack
from polymath_fast.learner.policy import Policy
from polymath_fast.models import random_models, resolve_model
from polymath_fast.precision import torch_dtype


@pytest.mark.parametrize("family", PUBLISHED)
def test_parameters_are_counted_as_published(family: str) -> None:
    assert memory.parameters(random_models.FAMILIES[family]) == PUBLISHED[family]


FAMILIES = ["tiny", "tiny-qwen2", "tiny-qwen3", "tiny-gemma"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_activations_are_what_autograd_keeps(family: str, dtype: str) -> None:
    folder = resolve_model(f"random:{family}")
    policy = Policy(folder, dtype=torch_dtype(dtype))
    rows = [
        TrainingRow(
            prompt_ids=tuple(range(40)),
            token_ids=list(range(first, first + 60)),
            sampling_logprobs=[0.0] * 60,
            advantage=1.0,
        )
        for first in range(6)
    ]
    batch = pack(rows)
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # holding it keeps its address from being reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        policy.hidden(batch)
    measured = sum(storage.nbytes() for storage in kept.values()) / batch.input_ids.shape[1]
    shape = json.loads((folder / "config.json").read_text())
    estimated = memory.activation_bytes(shape, dtype=dtype)
    assert estimated == pytest.approx(measured, rel=0.05)


def test_checkpointing_keeps_one_layer_and_the_inputs_of_all() -> None:
    shape = random_models.FAMILIES["smollm2-135m"]
    one = memory.activation_bytes(shape | {"num_hidden_layers": 1})
    found = memory.activation_bytes(shape, gradient_checkpointing=True)
    assert found == one + 30 * 576 * 2


def test_the_cache_of_a_token() -> None:
    # SmolLM2: 30 layers, 3 key heads of 64; keys and values of two bytes.
    shape = random_models.FAMILIES["smollm2-135m"]
    assert memory.kv_cache_bytes(shape) == 30 * 3 * 64 * 2 * 2
    assert memory.kv_cache_bytes(shape, "float32") == 30 * 3 * 64 * 2 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("count", "vocab"), [(7, 300), (3000, 1000), (5000, 9001)])
def test_a_cpu_asks_for_the_blocks_that_are_counted(
    count: int, vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, int] = {}
    buffer = head_gradient.buffer

    def noted(name: str, shape: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
        asked[name] = max(asked.get(name, 0), math.prod(shape) * kind.itemsize)
        return buffer(name, shape, kind)

    for module in (head, head_gradient):
        monkeypatch.setattr(module, "buffer", noted)
    hidden = torch.randn(count, 16).to(dtype).requires_grad_()
    weight = torch.randn(vocab, 16).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (count,))
    ends = torch.tensor([0, count], dtype=torch.int32)
    linear_grpo_loss(hidden, weight, targets, torch.ones(1), ends, impl="cpu").loss.backward()
    counted = footprint.lendable_bytes(count, vocab, 16, dtype, None)
    assert [asked["logits"], asked["slopes"]] == counted[:2]


def test_the_shape_may_come_from_a_config_file(tiny_model: Path) -> None:
    shape = json.loads((tiny_model / "config.json").read_text())
    tensors = Policy(tiny_model).model.parameters()
    assert memory.parameters(shape) == sum(tensor.numel() for tensor in tensors)
