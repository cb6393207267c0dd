"""Which strategy a run takes, binding a learner to foreign memory, and the proof of a sync."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polymath_fast.errors import EngineError, UserError
from polymath_fast.learner.flat_storage import FlatStorage
from polymath_fast.rollout import choose_weight_sync
from polymath_fast.rollout.weights import bind, checksums, compare

PLACES = {"inner": (4, (3, 5)), "head": (20, (6, 5)), "scale": (56, (5,))}


class Model(nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, (_, shape) in PLACES.items():
            value = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(value))


def engine_memory(places=PLACES, dtype=torch.bfloat16):
    storage = FlatStorage(torch.zeros(64, dtype=dtype), places)
    for name, view in storage.views().items():
        view.copy_(getattr(Model(), name).data.reshape(-1)[: view.numel()].view(view.shape))
    return storage


def test_a_bound_model_writes_into_the_engine():
    model, storage = Model(), engine_memory()
    assert [name for name, _ in bind(model, storage)] == list(PLACES)
    with torch.no_grad():
        model.head.fill_(3)
    assert (storage.live[20:50] == 3).all()
    assert (storage.live[50:56] == 0).all()


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        (engine_memory({k: v for k, v in PLACES.items() if k != "head"}), "load head as a tensor"),
        (engine_memory(PLACES | {"scale": (56, (4,))}),
         r"scale has shape \(5,\) in the learner and \(4,\)"),
        (engine_memory(dtype=torch.float32), "inner has dtype torch.bfloat16 .* torch.float32"),
    ],
)  # fmt: skip
def test_tensors_that_cannot_be_one_are_named_and_nothing_is_bound(storage, message):
    model = Model()
    before = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(UserError, match=message):
        bind(model, storage)
    assert [p.data_ptr() for p in model.parameters()] == before


def test_a_tensor_that_only_the_engine_has_is_refused():
    model = Model()
    del model.head
    with pytest.raises(UserError, match="a tensor head that the learner lacks"):
        bind(model, engine_memory())


def test_values_must_agree_before_they_are_shared():
    storage = engine_memory()
    storage.live[57] += 1
    with pytest.raises(EngineError, match="different values for scale"):
        bind(Model(), storage)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("shape", [(7,), (8, 3), (1024, 700)])
def test_a_checksum_depends_on_every_bit_and_not_on_the_address(dtype, shape):
    tensor = (torch.randn(shape) * 50).to(dtype)
    shifted = torch.zeros(tensor.numel() + 1, dtype=dtype)[1:].view(shape).copy_(tensor)
    assert checksums([tensor]) == checksums([shifted])
    for byte in (0, tensor.nbytes // 2, tensor.nbytes - 1):
        changed = tensor.clone()
        changed.view(-1).view(torch.uint8)[byte] ^= 1
        assert checksums([tensor]) != checksums([changed])
    assert checksums([tensor]) != checksums([tensor.flip(0)])


def test_compare_names_the_first_tensor_that_differs():
    storage = engine_memory()
    named = [*Model().named_parameters(), ("lm_head", torch.zeros(3))]
    compare(named, storage.views())
    storage.live[56:61].view(torch.int16)[2] ^= 1
    with pytest.raises(EngineError, match="1 of 3 tensors .* the first is scale"):
        compare(named, storage.views())
    with pytest.raises(EngineError, match="the learner has no head"):
        compare([(n, p) for n, p in named if n != "head"], storage.views())


@pytest.mark.parametrize(
    ("asked", "engine", "quantization", "name"),
    [
        ("auto", "vllm", None, "alias"),
        ("auto", "vllm", "fp8", "reload"),
        ("reload", "vllm", None, "reload"),
        ("alias", "vllm", None, "alias"),
        ("auto", "transformers", None, "identity"),
    ],
)
def test_the_strategy_and_the_reason(asked, engine, quantization, name):
    chosen, reason = choose_weight_sync(asked, engine, quantization=quantization)
    assert chosen == name
    assert reason
    assert quantization is None or quantization in reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"asked": "alias", "engine": "transformers"}, "leave it out, or take --engine vllm"),
        ({"asked": "alias", "engine": "vllm", "quantization": "fp8"}, "reload works"),
        ({"asked": "auto", "engine": "vllm", "quantization": "x", "verify": True}, "leave it out"),
    ],
)  # fmt: skip
def test_strategies_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        choose_weight_sync(**options)
