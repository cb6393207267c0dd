"""Fused decoder layers against transformers' own, on packed rows: log-probs and every gradient."""

from __future__ import annotations

import pytest
import torch
from closeness import relative_error

from polymath_fast.kernels import linear_grpo_loss
from polymath_fast.learner import fused_layers
from polymath_fast.learner.packing import TrainingRow, pack
from polymath_fast.learner.policy import Policy, shared_prompt_attention
from polymath_fast.models import resolve_model

FAMILIES = ["random:tiny", "random:tiny-qwen2", "random:tiny-qwen3"]


def load(family: str, dtype: torch.dtype, *, fused: bool) -> Policy:
    policy = Policy(resolve_model(family, notify=lambda text: None), dtype=dtype)
    assert policy.unfused is None
    if not fused:
        for module in policy.model.modules():
            module.__dict__.pop("forward", None)
    return policy


def batch():
    generator = torch.Generator().manual_seed(0)
    rows = [
        TrainingRow(
            prompt_ids=tuple(range(1, 8)),
            token_ids=torch.randint(3, 250, (length,), generator=generator).tolist(),
            sampling_logprobs=[-1.0] * length,
            advantage=length % 3 - 1.2,
        )
        for length in (5, 9, 1, 70)
    ]
    return pack(rows)


def learn(policy: Policy, times: int = 1) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    packed = batch()
    for _ in range(times):
        out = linear_grpo_loss(
            policy.hidden(packed),
            policy.head.weight,
            packed.targets,
            packed.advantages,
            packed.cu_seqlens,
        )
        out.loss.backward()
    return out.logprobs, {name: p.grad for name, p in policy.model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_agrees_with_transformers(family):
    logprobs, gradients = learn(load(family, torch.float32, fused=True))
    truth, true_gradients = learn(load(family, torch.float32, fused=False))
    torch.testing.assert_close(logprobs, truth, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == true_gradients.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, true_gradients[name]) < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_no_further_from_float32_than_transformers(family):
    # few tokens: one rounding against another differs by chance
    truth, true_gradients = learn(load(family, torch.float32, fused=False))
    ours, our_gradients = learn(load(family, torch.bfloat16, fused=True))
    theirs, their_gradients = learn(load(family, torch.bfloat16, fused=False))
    assert (ours - truth).abs().mean() < 1.3 * (theirs - truth).abs().mean()
    errors, allowed = (
        sum(relative_error(gradient, true_gradients[name]) for name, gradient in gradients.items())
        for gradients in (our_gradients, their_gradients)
    )
    assert errors < 1.3 * allowed


def test_gradients_go_to_a_sink_when_there_is_one():
    policy = load("random:tiny", torch.bfloat16, fused=True)
    weight = policy.model.get_decoder().layers[0].mlp.up_proj.weight
    sink = torch.full(weight.shape, torch.nan)
    calls = []

    def open_sink() -> tuple[torch.Tensor, bool]:
        calls.append(1)
        return sink, len(calls) > 1

    weight.gradient_sink = open_sink
    _, gradients = learn(policy, times=2)
    assert gradients["model.layers.0.mlp.up_proj.weight"] is None
    _, expected = learn(load("random:tiny", torch.bfloat16, fused=True), times=2)
    assert relative_error(sink, expected["model.layers.0.mlp.up_proj.weight"]) < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_weight_may_have_a_sink(dtype):
    """Head and embedding are one weight here: both add to its one sum."""
    policy = load("random:tiny", dtype, fused=True)
    sinks = {}

    def opens(name: str, weight: torch.Tensor):
        def open_sink() -> tuple[torch.Tensor, bool]:
            add = name in sinks
            if not add:
                sinks[name] = torch.full(weight.shape, torch.nan)
            return sinks[name], add

        return open_sink

    for name, weight in policy.model.named_parameters():
        weight.gradient_sink = opens(name, weight)
    _, gradients = learn(policy, times=2)
    _, expected = learn(load("random:tiny", dtype, fused=True), times=2)
    assert policy.head.weight is policy.model.get_decoder().embed_tokens.weight
    assert gradients["model.embed_tokens.weight"] is None
    allowed = 6e-3 if dtype == torch.bfloat16 else 1e-6
    for name, total in sinks.items():
        assert relative_error(total, expected[name]) < allowed, name


def test_weights_side_by_side_change_nothing():
    """One product over q, k and v together, as after the optimizer has laid weights out flat."""
    policy = load("random:tiny-qwen2", torch.float32, fused=True)
    truth, _ = learn(policy)
    for layer in policy.model.get_decoder().layers:
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            owner = layer.self_attn if names[0] == "q_proj" else layer.mlp
            weights = [getattr(owner, name).weight for name in names]
            flat = torch.cat([weight.data for weight in weights])
            for weight, part in zip(weights, flat.split([len(w) for w in weights]), strict=True):
                weight.data = part
    policy.model.zero_grad()
    logprobs, _ = learn(policy)
    torch.testing.assert_close(logprobs, truth, rtol=1e-5, atol=1e-5)


def test_other_activations_are_left_alone():
    policy = load("random:tiny", torch.float32, fused=False)
    policy.model.get_decoder().layers[1].mlp.act_fn = torch.nn.GELU()
    reason = fused_layers.fuse(policy.model, shared_prompt_attention)
    assert "GELU" in reason
    assert not any("forward" in module.__dict__ for module in policy.model.modules())
