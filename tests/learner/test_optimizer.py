"""Flat AdamW against the formula of the paper in float64."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import SETTINGS, Model, batches

from polymath_fast.config import Config
from polymath_fast.learner.optimizer import FlatAdamW, learning_rate_at


def formula(model, batches, config):
    """Loshchilov & Hutter (arXiv 1711.05101), algorithm 2, decay on matrices only."""
    params = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in params.items()}
    for step, x in enumerate(batches, start=1):
        live = {n: p.detach().float().requires_grad_() for n, p in params.items()}
        torch.func.functional_call(model, live, (x,)).backward()
        grads = {n: p.grad.double() for n, p in live.items()}
        norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
        for name, param in params.items():
            g = grads[name] * min(1.0, config.max_grad_norm / float(norm))
            m, v = moments[name]
            m.mul_(config.adam_beta1).add_(g, alpha=1 - config.adam_beta1)
            v.mul_(config.adam_beta2).addcmul_(g, g, value=1 - config.adam_beta2)
            direction = (m / (1 - config.adam_beta1**step)) / (
                (v / (1 - config.adam_beta2**step)).sqrt() + config.adam_eps
            )
            decay = config.weight_decay if param.dim() > 1 else 0.0
            with torch.no_grad():
                param.sub_(config.learning_rate * (direction + decay * param))
    return params


def test_equals_the_formula():
    config = Config(**SETTINGS)
    expected = formula(Model(torch.float32), batches(12), config)
    model = Model(torch.float32)
    optimizer = FlatAdamW(model, config)
    for x in batches(12):
        model(x).backward()
        assert all(p.grad is None for p in model.parameters())  # gathered, not kept twice
        norm, updated = optimizer.step(config.learning_rate)
        assert updated and norm > 0
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.double(), expected[name].detach(), rtol=2e-5, atol=2e-6)


def test_releasing_the_gradient_between_updates_changes_no_bit():
    results = []
    for release in (False, True):
        model = Model(torch.float32)
        optimizer = FlatAdamW(model, Config(**SETTINGS))
        for x in batches(4):
            model(x).backward()
            optimizer.step(1e-3)
            if release:
                optimizer.release()
        if release:
            assert not optimizer.grad.any()
        results.append(optimizer.live.clone())
    assert torch.equal(*results)


def test_tiny_updates_add_up_behind_bfloat16_weights():
    """At lr 1e-6 a bfloat16 weight alone would never move."""
    model = Model(torch.bfloat16)
    optimizer = FlatAdamW(model, Config(learning_rate=1e-6))
    start_live, start_master = optimizer.live.clone(), optimizer.tensors()["master"].clone()
    for x in batches(20):
        model(x.bfloat16()).backward()
        optimizer.step(1e-6)
    moved = (optimizer.tensors()["master"] - start_master).abs()
    assert moved.median() > 5e-6
    assert (optimizer.live == start_live).float().mean() > 0.9
    rounding = (optimizer.live - optimizer.tensors()["master"]).abs()
    assert (rounding <= 2.0**-8 * optimizer.tensors()["master"].abs()).all()
    for param in model.parameters():  # the model reads the flat buffer itself
        assert param.data_ptr() >= optimizer.live.data_ptr()


def test_gradients_of_several_passes_add_up_in_float32():
    model = Model(torch.bfloat16)
    optimizer = FlatAdamW(model, Config())
    singles = []
    for x in batches(4):
        model(x.bfloat16()).backward()
        singles.append(optimizer.grad.clone())
        optimizer.zero_grad()
    for x in batches(4):
        model(x.bfloat16()).backward()
    torch.testing.assert_close(optimizer.grad, torch.stack(singles).sum(0))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(poison):
    model = Model(torch.float32)
    optimizer = FlatAdamW(model, Config())
    model(batches(1)[0]).backward()
    optimizer.step(1e-3)
    before = {k: v.clone() for k, v in optimizer.tensors().items()}
    model(batches(1)[0]).backward()
    optimizer.grad[3] = poison
    norm, updated = optimizer.step(1e-3)
    assert not updated and not math.isfinite(norm)
    assert optimizer.updates == 1
    assert all(torch.equal(before[k], v) for k, v in optimizer.tensors().items())
    assert optimizer.grad.abs().sum() == 0


def test_continuing_from_saved_tensors_is_exact():
    def run(model, optimizer, data):
        for x in data:
            model(x.bfloat16()).backward()
            optimizer.step(1e-3)

    straight = Model(torch.bfloat16)
    whole = FlatAdamW(straight, Config(**SETTINGS))
    run(straight, whole, batches(10))
    first = Model(torch.bfloat16)
    half = FlatAdamW(first, Config(**SETTINGS))
    run(first, half, batches(10)[:5])
    saved = {k: v.clone() for k, v in half.tensors().items()}
    second = Model(torch.bfloat16)
    resumed = FlatAdamW(second, Config(**SETTINGS))
    resumed.load(saved, half.updates)
    run(second, resumed, batches(10)[5:])
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name


def test_tensors_before_the_first_update_are_zero_moments():
    optimizer = FlatAdamW(Model(torch.float32), Config())
    tensors = optimizer.tensors()
    assert tensors["exp_avg"].shape == tensors["master"].shape
    assert tensors["exp_avg"].count_nonzero() == tensors["exp_avg_sq"].count_nonzero() == 0


def test_schedules():
    constant = Config(learning_rate=1.0, warmup_steps=4, max_steps=10)
    assert [learning_rate_at(s, constant) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = Config(learning_rate=1.0, lr_schedule="cosine", max_steps=10)
    assert learning_rate_at(0, cosine) == 1.0
    assert learning_rate_at(5, cosine) == pytest.approx(0.5)
    assert 0 < learning_rate_at(9, cosine) < 0.03
