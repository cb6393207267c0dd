"""OpenRLHF's log-probs and entropies on our kernels, against its formulas."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from polymath_fast import integrations
from polymath_fast.errors import UserError
from polymath_fast.integrations import openrlhf


def log_probs_from_logits(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """What OpenRLHF computes for fp32 logits, without its change of `logits`."""
    logits = logits / temperature
    picked = logits.gather(-1, labels[..., None]).squeeze(-1)
    return picked - logits.logsumexp(-1)


def compute_entropy(logits: torch.Tensor) -> torch.Tensor:
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


@pytest.fixture
def head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden (2, 5, 8), weight (33, 8), labels (2, 5)"""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(2, 5, 8, generator=generator).requires_grad_()
    weight = torch.randn(33, 8, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(33, (2, 5), generator=generator)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """OpenRLHF's modules around the formulas; its package needs deepspeed and a GPU."""
    utils, actor = ModuleType("openrlhf.models.utils"), ModuleType("openrlhf.models.actor")
    for module in (utils, actor):
        module.log_probs_from_logits = log_probs_from_logits
        module.compute_entropy = compute_entropy
    top, models = ModuleType("openrlhf"), ModuleType("openrlhf.models")
    top.models, models.utils, models.actor = models, utils, actor
    for module in (top, models, utils, actor):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(integrations, "version", lambda name: "0.11.2")
    return models


def test_from_logits(head) -> None:
    hidden, weight, labels = head
    logits = (hidden @ weight.T).detach().requires_grad_()
    before = logits.detach().clone()
    ours = openrlhf.log_probs_from_logits(logits, labels, temperature=0.6)
    entropy = openrlhf.compute_entropy(logits)
    expected = log_probs_from_logits(logits, labels, 0.6)
    assert_close(ours, expected)
    assert_close(entropy, compute_entropy(logits))
    (gradient,) = torch.autograd.grad((ours + 0.1 * entropy).sum(), logits)
    both = (expected + 0.1 * compute_entropy(logits)).sum()
    assert_close(gradient, torch.autograd.grad(both, logits)[0], rtol=1e-4, atol=1e-6)
    assert torch.equal(logits, before)


def test_labels_of_another_shape_are_refused(head) -> None:
    hidden, weight, labels = head
    with pytest.raises(ValueError, match=r"labels are .*logits .*: want one label a row"):
        openrlhf.log_probs_from_logits(hidden @ weight.T, labels.T)
    with pytest.raises(ValueError, match=r"labels are .*hidden .*: want one label a row"):
        openrlhf.linear_log_probs(hidden, weight, labels.T)


def test_a_token_that_never_comes_keeps_no_gradient_from_the_entropy() -> None:
    """Also where it is the one that the operator is asked about for want of a label."""
    logits = torch.randn(3, 7, dtype=torch.float64).float()
    logits[:, 0] = -torch.inf
    leaf = logits.clone().requires_grad_()
    openrlhf.compute_entropy(leaf).sum().backward()
    truth = logits.double().requires_grad_()
    p = truth[:, 1:].softmax(-1)
    (-(p * p.log()).sum()).backward()
    assert_close(leaf.grad[:, 1:].double(), truth.grad[:, 1:], rtol=1e-5, atol=1e-7)
    assert not leaf.grad[:, 0].any()


def test_from_the_head(head) -> None:
    hidden, weight, labels = head
    bias = torch.linspace(-1, 1, 33).requires_grad_()
    logprobs, entropy = openrlhf.linear_log_probs(hidden, weight, labels, 0.6, bias)
    logits = hidden @ weight.T + bias
    expected = log_probs_from_logits(logits, labels, 0.6)
    expected_entropy = compute_entropy(logits / 0.6)
    assert_close(logprobs, expected)
    assert_close(entropy, expected_entropy)
    inputs = (hidden, weight, bias)
    ours = torch.autograd.grad((logprobs + 0.1 * entropy).sum(), inputs)
    theirs = torch.autograd.grad((expected + 0.1 * expected_entropy).sum(), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_patch_and_undo(package: ModuleType) -> None:
    with openrlhf.patch_openrlhf():
        for module in (package.utils, package.actor):
            assert module.log_probs_from_logits is openrlhf.log_probs_from_logits
            assert module.compute_entropy is openrlhf.compute_entropy
        with pytest.raises(UserError, match="is replaced already"):
            openrlhf.patch_openrlhf()
    assert package.actor.log_probs_from_logits is log_probs_from_logits
    assert package.actor.compute_entropy is compute_entropy


def test_other_arguments_are_refused(package: ModuleType) -> None:
    package.utils.compute_entropy = lambda logits, chunk_size: logits
    with pytest.raises(UserError, match=r"compute_entropy takes \['logits', 'chunk_size'\]"):
        openrlhf.patch_openrlhf()


@pytest.mark.skipif(importlib.util.find_spec("openrlhf") is not None, reason="it is installed")
def test_missing_package_is_named() -> None:
    with pytest.raises(ImportError, match="pip install openrlhf==0.11.0"):
        openrlhf.patch_openrlhf()
