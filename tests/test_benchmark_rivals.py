"""Others' code that ours is timed beside does the same work: its results are those of float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from benchmarks import gpu_learner, gpu_learner_rivals, gpu_report, gpu_rivals, rivals
from polymath_fast.models import random_models

VERL_HEAD = """
import torch

class FusedLinearForPPO(torch.nn.Module):
    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        logprobs = (hidden_states @ vocab_weights.T / temperature).log_softmax(-1)
        picked = logprobs.gather(-1, input_ids[:, None])[:, 0]
        return picked, -(logprobs.exp() * logprobs).sum(-1)
"""


@dataclass
class Watched(rivals.HeadData):
    """Keeps the leaves that a variant was given last."""

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.given = super().leaves()
        return self.given


@pytest.fixture
def head() -> Watched:
    """N = 600, more than a chunk of verl's; H = 32, V = 300"""
    torch.manual_seed(0)
    hidden, weight = torch.randn(600, 32), torch.randn(300, 32)
    targets = torch.randint(300, (600,))
    old = truth(hidden, weight, targets).float() + 0.3 * torch.randn(600)
    return Watched(hidden, weight, targets, torch.randn(6), old)


@pytest.fixture
def verl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed verl without ray and the rest of what it needs."""
    utils = tmp_path / "verl" / "utils"
    (utils / "experimental").mkdir(parents=True)
    for package in (utils.parent, utils):
        (package / "__init__.py").write_text("import a_package_that_is_not_installed\n")
    (utils / "experimental" / "torch_functional.py").write_text(VERL_HEAD)
    monkeypatch.syspath_prepend(tmp_path)
    before = forget_verl()
    yield
    forget_verl()
    sys.modules.update(before)


def forget_verl() -> dict[str, object]:
    names = [name for name in sys.modules if name.split(".")[0] == "verl"]
    return {name: sys.modules.pop(name) for name in names}


def truth(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (hidden.double() @ weight.double().T).log_softmax(-1)[range(len(targets)), targets]


def test_everyone_computes_the_same_loss_gradients_and_logprobs(head: Watched, verl: None) -> None:
    exact = [leaf.double().requires_grad_() for leaf in (head.hidden, head.weight)]
    logprobs = truth(*exact, head.targets)
    ratio, advantages = (logprobs - head.old_logprobs).exp(), head.per_token
    bounded = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    bounded.mean().neg().backward()
    # the compiler would take most of a minute; it shall compile what is right
    with torch.compiler.set_stance("force_eager"):
        losses, forwards = rivals.head_losses(head), rivals.head_logprobs(head)
        for name, variant in losses.items():
            variant()
            for found, expected in zip(head.given, exact, strict=True):
                error = (found.grad - expected.grad).norm() / expected.grad.norm()
                assert error < 1e-5, f"{name}: {error:.1e}"
        for name, variant in forwards.items():
            found = variant()
            assert not found.requires_grad
            assert_close(found.double(), logprobs.detach(), atol=1e-4, rtol=0, msg=name)
    assert {"torch.compile, 8 chunks", "eager", "verl chunked"} <= losses.keys() & forwards.keys()


def test_what_is_not_installed_is_left_out(head: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "find_spec", lambda name: None)
    for variants in (rivals.head_losses(head), rivals.head_logprobs(head)):
        assert list(variants) == ["torch.compile, 8 chunks", "eager"]


def test_on_a_gpu_their_kernels_take_part_and_their_failures_are_not_ours(
    head: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rivals, gpu_rivals, gpu_learner):
        monkeypatch.setattr(module, "find_spec", lambda name: name)
    losses, forwards = gpu_rivals.head_losses(head), gpu_rivals.head_logprobs(head)
    assert {"cce", "verl kernels", "verl chunked", "trl chunked"} <= losses.keys() & forwards.keys()
    # forward it leaves nothing out, and a GPU needs no stand-in for kernels
    assert gpu_rivals.CCE_FILTERED in losses.keys() - forwards.keys()
    assert not {*gpu_rivals.FOR_CPUS} & {*losses, *forwards}
    learners = gpu_learner._rivals()
    assert {"transformers", "trl", "trl with liger's layers"} == learners.keys()
    for name in (*losses, *forwards, *learners):
        rows = [{"what": name, "error": "no"}, {"what": "triton", "median": 1.0}]
        assert gpu_report.failure("a section", {"rows": rows}) is None, name


def test_layers_of_liger_stay_in_the_model_that_they_are_for() -> None:
    pytest.importorskip("liger_kernel")
    pytest.importorskip("trl.trainer.grpo_trainer")
    from transformers.models.qwen2 import modeling_qwen2

    before = dict(vars(modeling_qwen2))
    model = random_models.in_memory("tiny-qwen2", "float32")
    rows = gpu_learner.random_rows((5, 2, 6), model.config.vocab_size)
    gpu_learner_rivals.trl_steps(model, rows, 1, liger=True)
    assert vars(modeling_qwen2) == before
    layer = model.model.layers[0]
    for part in (layer.mlp, layer.input_layernorm):
        assert part.forward.__func__.__module__.startswith("liger_kernel")


def test_the_steps_of_trl_have_the_gradient_of_the_padded_pass() -> None:
    # here, with all that it finds: `gpu_learner_rivals` would hide vLLM from this process's TRL
    pytest.importorskip("trl.trainer.grpo_trainer")
    shape, at_once = (5, 3, 6), 2
    plain, trained = (random_models.in_memory("tiny-qwen2", "float32") for _ in range(2))
    rows = gpu_learner.random_rows(shape, plain.config.vocab_size, ragged=True)
    counts = torch.tensor([len(row.token_ids) for row in rows])
    advantages = torch.tensor([row.advantage for row in rows]).repeat_interleave(counts)
    logprobs = gpu_learner_rivals.padded_logprobs(plain, rows)
    (logprobs * advantages).mean().neg().backward()
    gpu_learner_rivals.trl_steps(trained, rows, at_once)()
    for (name, expected), found in zip(plain.named_parameters(), trained.parameters(), strict=True):
        assert_close(found.grad, expected.grad, atol=1e-6, rtol=1e-4, msg=name)
