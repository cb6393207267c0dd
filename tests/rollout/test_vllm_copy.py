"""Copies into vLLM's own model classes: values, moved tensors, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parallel_models import SMALL, build, make_folder, weights_of
from torch import nn

from polymath_fast.errors import EngineError, UserError
from polymath_fast.rollout import vllm_copy
from polymath_fast.rollout.vllm_copy import CopySync

SHAPE = {"model_type": "qwen2", "tie_word_embeddings": True, **SMALL}


def shell(model: nn.Module, **settings: Any) -> Any:
    """What CopySync sees of a vllm.LLM, around `model`."""
    asked = {"quantization": None, "use_mla": False, "lora_config": None, "world_size": 1}
    asked |= settings
    config = SimpleNamespace(
        model_config=SimpleNamespace(quantization=asked["quantization"], use_mla=asked["use_mla"]),
        parallel_config=SimpleNamespace(world_size=asked["world_size"]),
        lora_config=asked["lora_config"],
    )
    runner = SimpleNamespace(get_model=lambda: model)
    executor = SimpleNamespace(
        driver_worker=SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
    )
    engine = SimpleNamespace(model_executor=executor, vllm_config=config)
    llm = SimpleNamespace(llm_engine=engine, resets=0)

    def reset_prefix_cache() -> bool:
        llm.resets += 1
        return asked.get("idle", True)

    llm.reset_prefix_cache = reset_prefix_cache
    return llm


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_pushes_are_what_load_weights_does(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path, SHAPE)
    truth, model = (build(folder, 1, 0, "cpu", monkeypatch) for _ in range(2))
    changes = []
    llm = shell(model)
    sync = CopySync(llm, SimpleNamespace(changed=lambda: changes.append(1)))
    weights = weights_of(SHAPE, dtype, "cpu")
    for version in (1, 2, 3):
        if version == 2:  # in place, as an optimizer does
            for weight in weights.values():
                weight.data.mul_(1.5)
        if version == 3:  # tensors elsewhere
            weights = weights_of(SHAPE, dtype, "cpu")
        sync.push(weights.items(), version)
        truth.load_weights(iter(weights.items()))
        for name, parameter in truth.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), (version, name)
        assert (sync.version, llm.resets, len(changes)) == (version, version, version)
    moved = model.model.norm.weight
    moved.data = moved.data.clone()
    with pytest.raises(EngineError, match="vLLM moved model.norm.weight"):
        sync.push(weights.items(), 4)
    assert sync.version == 3


def test_a_busy_engine_is_an_error() -> None:
    model = nn.Linear(4, 4, bias=False)
    model.load_weights = lambda weights: [model.weight.data.copy_(w) for _, w in weights]
    sync = CopySync(shell(model, idle=False))
    with pytest.raises(EngineError, match="still busy"):
        sync.push([("weight", torch.ones(4, 4))], 1)
    assert sync.version == 0


def test_a_device_that_fails_is_the_engines_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a step that was learned survives."""

    def fails(_: object) -> None:
        raise RuntimeError("weight_sync did not launch: an illegal address (CUDA error 700)")

    model = nn.Linear(4, 4, bias=False)
    model.load_weights = lambda weights: [model.weight.data.copy_(w) for _, w in weights]
    sync = CopySync(shell(model))
    monkeypatch.setattr(vllm_copy, "weight_sync", fails)
    with pytest.raises(EngineError, match="did not reach the engine: .* did not launch"):
        sync.push([("weight", torch.ones(4, 4))], 1)
    assert sync.version == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "fp8"}, r"quantised \(fp8\)"),
        ({"lora_config": object()}, "LoRA"),
        ({"world_size": 2}, "2 processes"),
        ({"use_mla": True}, "MLA"),
    ],
)
def test_engines_that_do_not_keep_plain_weights_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message + ".*--weight-sync reload works"):
        CopySync(shell(nn.Linear(2, 2), **settings))


def test_layers_that_rearrange_their_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].quant_method = type("Fp8LinearMethod", (), {})()
    with pytest.raises(UserError, match="engine's 0 rearranges.*Fp8LinearMethod"):
        CopySync(shell(model))
    model[0].quant_method = None
    model[0].weight.data = torch.empty(0)
    with pytest.raises(UserError, match="repacked 0.weight"):
        CopySync(shell(model))
