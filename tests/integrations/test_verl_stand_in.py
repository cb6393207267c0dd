"""Registering with verl, patching it and its plugin, on a package that has verl's names alone."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close
from verl_formulas import AGGREGATIONS, Batch, Config, loss_by_formula, run_loss

from polymath_fast import integrations
from polymath_fast.errors import UserError
from polymath_fast.integrations.verl import patch_verl, register_losses
from polymath_fast.kernels import PolicyLossSpec, policy_loss

MODES = (
    *("vanilla", "gspo", "geo_mean", "cispo", "sapo", "gpg", "dro", "dppo_tv", "dppo_kl"),
    *("clip_cov", "kl_cov"),
)
PLUGIN = "polymath_fast.integrations.verl.plugin"
HEADS = {
    "verl.utils.experimental.torch_functional": "FusedLinearForPPO",
    "verl.utils.kernel.linear_cross_entropy": "linear_cross_entropy",
}


def forget() -> dict[str, ModuleType]:
    """Modules of a verl and of the plugin, which are imported no more."""
    names = [name for name in sys.modules if name.split(".")[0] == "verl" or name == PLUGIN]
    return {name: sys.modules.pop(name) for name in names}


def installed_is(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrations, "version", lambda package: {"verl": version}[package])


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    installed = forget()
    monkeypatch.delenv("VERL_USE_EXTERNAL_MODULES", raising=False)
    monkeypatch.syspath_prepend(Path(__file__).with_name("verl_stand_in"))
    installed_is("0.9.1", monkeypatch)
    yield
    forget()
    sys.modules.update(installed)


@pytest.fixture
def batch() -> Batch:
    """Completions of 7, 3 and no tokens."""
    normal = torch.randn(3, 3, 7, dtype=torch.float64)
    log_prob = -normal[0].abs() - 0.05
    old = (log_prob + 0.5 * normal[1]).clamp(max=-1e-3)
    old[1, 0] = log_prob[1, 0] - 1  # a bad token that became likelier, for dual clips
    return Batch(
        log_prob=log_prob.requires_grad_(),
        old=old,
        advantages=torch.tensor([1.2, -0.8, 2.0]).double()[:, None].expand(3, 7),
        mask=torch.arange(7) < torch.tensor([[7], [3], [0]]),
        weights=normal[2].abs() + 0.2,
    )


def registry() -> ModuleType:
    return importlib.import_module("verl.trainer.ppo.core_algos")


def heads() -> list[object]:
    """What verl would call now."""
    return [getattr(importlib.import_module(module), name) for module, name in HEADS.items()]


@pytest.mark.parametrize("mode", MODES)
def test_each_loss_is_found_by_its_name(batch: Batch, mode: str) -> None:
    assert sorted(register_losses()) == sorted(f"polymath_fast_{mode}" for mode in MODES)
    found = registry().get_policy_loss_fn(f"polymath_fast_{mode}")
    # verl calls it by these
    assert list(inspect.signature(found).parameters) == [
        "old_log_prob",
        "log_prob",
        "advantages",
        "response_mask",
        "loss_agg_mode",
        "config",
        "rollout_is_weights",
    ]
    loss, gradient, _ = run_loss(found, "token-mean", batch, Config(), True)
    expected = loss_by_formula(mode, "token-mean", batch, Config(), True)
    assert_close(loss, expected.detach())
    assert_close(gradient, torch.autograd.grad(expected, batch.log_prob)[0], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("version", ["0.9.0", "0.9.1"])
def test_gspo_is_summed_up_as_the_installed_verl_does(
    batch: Batch, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed_is(version, monkeypatch)
    register_losses()
    found = registry().get_policy_loss_fn("polymath_fast_gspo")
    losses = []
    for how in AGGREGATIONS:
        losses.append(run_loss(found, how, batch, Config(), True)[0])
        assert_close(
            losses[-1], loss_by_formula("gspo", how, batch, Config(), True, version).detach()
        )
    assert len(set(map(float, losses))) == {"0.9.0": 1, "0.9.1": len(AGGREGATIONS)}[version]


CLIPS = {"epsilon": 0.15, "epsilon_high": 0.28}
SPECS = {
    "vanilla": PolicyLossSpec(loss_type="dapo", clip_ratio_c=1.6, normalizer=10.0, **CLIPS),
    "gspo": PolicyLossSpec(
        loss_type="gspo",
        importance_sampling_level="sequence_token",
        aggregation="token-mean",
        normalizer=10.0,
        **CLIPS,
    ),
    "sapo": PolicyLossSpec(
        loss_type="sapo", sapo_temperature_pos=1.0, sapo_temperature_neg=1.2, normalizer=2.0
    ),
}
"""verl's mode -> the same loss in our words: 10 tokens of 2 completions"""


@pytest.mark.parametrize("mode", SPECS)
def test_a_registered_loss_is_the_tables(batch: Batch, mode: str) -> None:
    register_losses()
    found = registry().get_policy_loss_fn(f"polymath_fast_{mode}")
    loss, gradient, _ = run_loss(found, "token-mean", batch, Config(), False)
    out = policy_loss(
        batch.log_prob[batch.mask],
        batch.advantages[:2, 0],
        torch.tensor([0, 7, 10], dtype=torch.int32),
        old_logprobs=batch.old[batch.mask],
        spec=SPECS[mode],
    )
    assert_close(loss, out.loss.detach())
    assert_close(gradient, torch.autograd.grad(out.loss, batch.log_prob)[0])


def test_both_heads_compute_what_torch_does_until_they_are_restored() -> None:
    hidden, weight = torch.randn(2, 4, 8), torch.randn(33, 8)
    labels = torch.randint(33, (2, 4))
    logprobs = ((hidden @ weight.T) / 0.7).log_softmax(-1)
    picked = logprobs.gather(-1, labels[..., None])[..., 0]
    truth = picked, -(logprobs.exp() * logprobs).sum(-1)
    before = heads()
    holder = ModuleType("verl.models.holder")  # one that was imported earlier keeps the name
    sys.modules[holder.__name__], holder.head = holder, before[0]
    patch = patch_verl()
    module, function = heads()
    assert holder.head is module
    # a backend of its own is what verl 0.9.1 names
    head = module(chunk_size=4, impl_backend="liger")
    found = head(hidden, weight, labels, temperature=0.7)
    flat = function(hidden.reshape(8, 8), weight, labels.flatten(), 0.7, "none")
    for wanted, mine, flattened in zip(truth, found, flat, strict=True):
        assert_close(mine, wanted, atol=1e-5, rtol=0)
        assert_close(flattened, wanted.flatten(), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="FusedLinearForPPO is replaced already"):
        patch_verl()
    patch.undo()
    assert heads() == before and holder.head is before[0]
    with pytest.raises(RuntimeError, match="verl's own head"):
        heads()[0]()(hidden, weight, labels)


@pytest.mark.parametrize(
    ("module", "owner"), zip(HEADS, ("FusedLinearForPPO", "LinearCrossEntropy"), strict=True)
)
def test_a_head_that_takes_other_arguments_is_not_replaced(module: str, owner: str) -> None:
    before = heads()
    getattr(sys.modules[module], owner).forward = lambda self, hidden, weight, scale: None
    with pytest.raises(UserError, match=rf"{owner} takes \['self', 'hidden', 'weight', 'scale'\]"):
        patch_verl()
    assert heads() == before


def test_naming_the_plugin_applies_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while verl is being imported, which is when it imports what was named."""
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", PLUGIN)
    importlib.import_module("verl")
    plugin = sys.modules[PLUGIN]
    assert len(plugin.LOSSES) == len(MODES)
    assert {*plugin.LOSSES} == {*registry().POLICY_LOSS_REGISTRY}
    assert all(head.__module__ == "polymath_fast.integrations.verl.head" for head in heads())
    plugin.PATCH.undo()
    assert heads()[0].__module__ == "verl.utils.experimental.torch_functional"


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrations, "version", lambda package: "0.10.0")
    message = r"verl 0\.10\.0 is installed, this adapter knows 0\.9\.x .*pip install verl==0\.9\.1"
    for apply in (register_losses, patch_verl):
        with pytest.raises(ImportError, match=message):
            apply()
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", PLUGIN)
    with pytest.raises(ImportError, match=message):
        importlib.import_module("verl")
