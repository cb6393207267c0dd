"""Recorded copies against what vLLM's own loaders do: architectures, heads, tensor parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parallel_models import SMALL, build, make_folder, weights_of

from polymath_fast.errors import UserError
from polymath_fast.kernels import weight_sync
from polymath_fast.models import random_models
from polymath_fast.rollout.segments import record

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

RANKS = [(1, 0), (2, 1), (4, 0), (4, 3)]


@pytest.mark.parametrize(("size", "rank"), RANKS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_copy_is_what_load_weights_does(
    family: str, tied: bool, size: int, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"model_type": family, "tie_word_embeddings": tied, **SMALL}
    folder = make_folder(tmp_path, shape)
    truth, model = (build(folder, size, rank, "cpu", monkeypatch) for _ in range(2))
    weights = weights_of(shape, torch.float32, "cpu")
    truth.load_weights(iter(weights.items()))
    for parameter in model.parameters():
        parameter.data.fill_(-3.0)
    targets = dict(model.named_parameters())
    plan = record(model.load_weights, weights, targets, rank=rank, world_size=size)
    before = {name: target.clone() for name, target in targets.items()}
    assert all((before[name][:8] == -3.0).all() for name in before)  # recording moves nothing
    weight_sync(plan.table(weights, targets))
    for name, expected in truth.named_parameters():
        assert torch.equal(targets[name], expected), name


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("family", ["qwen2.5-1.5b", "qwen2.5-7b", "qwen3-0.6b", "llama-3.2-1b"])
def test_true_shapes_are_covered(
    family: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = random_models.FAMILIES[family]
    model = build(make_folder(tmp_path, shape), size, size - 1, "meta", monkeypatch)
    weights = weights_of(shape, torch.bfloat16, "meta")
    targets = dict(model.named_parameters())
    plan = record(model.load_weights, weights, targets, rank=size - 1, world_size=size)
    # vocabularies of these are multiples of 64 a rank: nothing is padded
    assert sum(t.numel for _, t in plan.moves) == sum(t.numel() for t in targets.values())
    assert len(plan.moves) == len({id(w) for w in weights.values()})


def test_a_learner_that_is_not_the_engine_s_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"model_type": "qwen2", "tie_word_embeddings": True, **SMALL}
    model = build(make_folder(tmp_path, shape), 1, 0, "meta", monkeypatch)
    targets = dict(model.named_parameters())
    weights = weights_of(shape, torch.bfloat16, "cpu")
    untied = weights | {"lm_head.weight": weights["lm_head.weight"].clone()}
    with pytest.raises(UserError, match="no place for lm_head.weight.*tied"):
        record(model.load_weights, untied, targets)
    wide = weights_of(shape | {"intermediate_size": 128}, torch.bfloat16, "cpu")
    with pytest.raises(UserError, match="12288 of the 16384 elements of model.layers.0.mlp"):
        record(model.load_weights, wide, targets)
    short = {n: w for n, w in weights.items() if n != "model.layers.1.self_attn.k_proj.bias"}
    with pytest.raises(UserError, match="layers.1.self_attn.qkv_proj.bias .element 128 of 192"):
        record(model.load_weights, short, targets)
