"""What of vLLM cannot share its weights with the learner is refused. Needs no vLLM.

The modules under test import vLLM, which takes ten seconds: they are loaded once more here, beside
stand-ins for the few names that they look up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import nn

from polymath_fast.errors import UserError

Load = Callable[..., ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Makes a copy of a module of ours that finds `theirs`: a module of vLLM -> its names."""

    def load(name: str, theirs: dict[str, dict[str, Any]]) -> ModuleType:
        for full, names in theirs.items():
            module = ModuleType(full)
            vars(module).update(names)
            monkeypatch.setitem(sys.modules, full, module)
        spec = find_spec(f"polymath_fast.rollout.{name}")
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


class Loaded(Exception):
    """The weights were about to be loaded."""


class DefaultModelLoader:
    def __init__(self, load_config: object) -> None:
        self.load_config = load_config

    def load_model(self, vllm_config: object, model_config: object, prefix: str = "") -> nn.Module:
        raise Loaded


@pytest.fixture
def loader(load: Load) -> ModuleType:
    layers = "vllm.model_executor.layers"
    models = "vllm.model_executor.model_loader"
    return load(
        "vllm_loader",
        {
            "vllm": {"_custom_ops": SimpleNamespace()},
            f"{layers}.linear": {"UnquantizedLinearMethod": type("Linear", (), {})},
            f"{layers}.vocab_parallel_embedding": {
                "UnquantizedEmbeddingMethod": type("Embedding", (), {})
            },
            models: {"register_model_loader": lambda name: lambda cls: cls},
            f"{models}.default_loader": {"DefaultModelLoader": DefaultModelLoader},
        },
    )


def load_model(loader: ModuleType, **settings: Any) -> None:
    """As an engine of these settings does it that has `--weight-sync alias`."""
    plain = {"quantization": None, "lora_config": None, "enable_sleep_mode": False, "world_size": 1}
    asked = SimpleNamespace(**(plain | settings))
    config = SimpleNamespace(
        model_config=asked, parallel_config=asked, lora_config=asked.lora_config
    )
    live = loader.LiveWeightsLoader(SimpleNamespace(load_format=loader.LOAD_FORMAT))
    assert live.load_config.load_format == "auto"
    live.load_model(config, config.model_config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "fp8"}, r"weights are quantised \(fp8\), .*--weight-sync reload works"),
        ({"lora_config": object()}, "for LoRA adapters, .*--weight-sync reload works"),
        ({"enable_sleep_mode": True}, "sleep mode takes the memory .*leave out enable_sleep_mode"),
        ({"world_size": 2}, "2 ranks split the engine's weights, .*--weight-sync reload works"),
    ],
    ids=["quantised", "LoRA", "sleep mode", "ranks"],
)
def test_engines_that_move_their_weights_are_refused_before_they_load_them(
    loader: ModuleType, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_model(loader, **settings)


def test_a_plain_engine_loads_its_weights(loader: ModuleType) -> None:
    with pytest.raises(Loaded):
        load_model(loader)


def test_weights_of_several_dtypes_are_refused(loader: ModuleType) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2).to(torch.bfloat16))
    before = [parameter.data_ptr() for parameter in model.parameters()]
    message = r"several dtypes \(torch.bfloat16, torch.float32\), .*--weight-sync reload works"
    with pytest.raises(UserError, match=message):
        loader._gather(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before
    loader._gather(model.float())
    assert [parameter.data_ptr() for parameter in model.parameters()] != before


class Factory:
    """vLLM's, which takes a name once."""

    def __init__(self) -> None:
        self._registry: dict[str, type] = {}

    def register_engine(self, name: str, engine: type) -> None:
        if name in self._registry:
            raise ValueError(f"Weight transfer engine '{name}' is already registered.")
        self._registry[name] = engine


def transfer_beside(load: Load, **methods: Any) -> tuple[ModuleType, dict[str, type]]:
    """Our backend for a vLLM whose engines have these methods, and vLLM's registry."""

    class Engine(Generic[TypeVar("Init"), TypeVar("Update")]):
        pass

    for name, method in methods.items():
        setattr(Engine, name, method)
    infos = {"WeightTransferInitInfo": object, "WeightTransferUpdateInfo": object}
    base = SimpleNamespace(WeightTransferEngine=Engine, **infos)
    factory = SimpleNamespace(WeightTransferEngineFactory=Factory())
    package = {"vllm.distributed.weight_transfer": {"base": base, "factory": factory}}
    return load("vllm_transfer", package), factory.WeightTransferEngineFactory._registry


def test_a_transfer_api_without_start_weight_update_is_refused(
    loader: ModuleType, load: Load
) -> None:
    transfer, known = transfer_beside(load)
    with pytest.raises(UserError, match="0.32 has it, and --weight-sync alias and reload work"):
        transfer.register()
    assert known == {}


def test_the_backend_is_registered_once(loader: ModuleType, load: Load) -> None:
    transfer, known = transfer_beside(load, start_weight_update=lambda self: None)
    transfer.register()
    transfer.register()
    assert known == {"polymath_fast": transfer.InProcessWeightTransfer}
