"""Policy losses against autograd through their published formulas, in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from policy_cases import Case, loss_and_gradient, make_case
from torch import Tensor
from torch.testing import assert_close

from polymath_fast.kernels import PolicyLossSpec, policy_loss

LOW, HIGH = 0.15, 0.25


def _dual_clip(x: Tensor, old: Tensor, a: Tensor) -> Tensor:
    ratio = (x - old).exp()
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - LOW, 1 + HIGH))
    return torch.where(a < 0, torch.minimum(loss, -1.3 * a), loss)


def _cispo_two_sided(x: Tensor, old: Tensor, a: Tensor) -> Tensor:
    return -(x - old).exp().clamp(1 - LOW, 1 + HIGH).detach() * a * x


def _dro(x: Tensor, old: Tensor, a: Tensor) -> Tensor:
    return -(a * x - 0.5 * 0.3 * (x - old) ** 2)


def _dppo_tv(x: Tensor, old: Tensor, a: Tensor) -> Tensor:
    gap = x.exp() - old.exp()
    valid = torch.where(a > 0, gap <= 0.08, gap >= -0.05)
    return (-a * (x - old).exp().clamp(max=1.3) * valid).detach() * x


def _dppo_kl(x: Tensor, old: Tensor, a: Tensor) -> Tensor:
    p, q = x.exp(), old.exp()
    kl = q * (old - x) + (1 - q) * torch.log((1 - q) / (1 - p))
    valid = torch.where(a > 0, (kl <= 0.02) | (p <= q), (kl <= 0.01) | (p >= q))
    return (-a * (x - old).exp().clamp(max=20) * valid).detach() * x


BY_TOKEN: dict[str, tuple[PolicyLossSpec, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "dual clip": (
        PolicyLossSpec(loss_type="dapo", epsilon=LOW, epsilon_high=HIGH, clip_ratio_c=1.3),
        _dual_clip,
    ),
    "cispo two-sided": (
        PolicyLossSpec(loss_type="cispo_two_sided", epsilon=LOW, epsilon_high=HIGH),
        _cispo_two_sided,
    ),
    "reinforce": (PolicyLossSpec(loss_type="reinforce"), lambda x, old, a: -a * x),
    "gpg": (PolicyLossSpec(loss_type="gpg"), lambda x, old, a: -a * x),
    "dro": (PolicyLossSpec(loss_type="dro", dro_beta=0.3), _dro),
    "dppo_tv": (
        PolicyLossSpec(loss_type="dppo_tv", epsilon=0.05, epsilon_high=0.08, clip_ratio_c=1.3),
        _dppo_tv,
    ),
    "dppo_kl": (PolicyLossSpec(loss_type="dppo_kl", epsilon=0.01, epsilon_high=0.02), _dppo_kl),
}


def _assert_same(case: Case, spec: PolicyLossSpec, expected: Tensor, **extra: Tensor) -> None:
    (gradient,) = torch.autograd.grad(expected, case.logprobs, retain_graph=True)
    assert gradient.abs().max() > 1e-3
    loss, ours = loss_and_gradient(case, spec, **extra)
    assert_close(loss, expected.detach())
    assert_close(ours, gradient)


@pytest.mark.parametrize("name", BY_TOKEN)
def test_token_losses_against_autograd(name: str) -> None:
    spec, formula = BY_TOKEN[name]
    case = make_case(seed=1)
    per_token = formula(case.logprobs, case.old, case.advantages[:, None]) * case.trained
    _assert_same(case, spec, per_token.sum() / case.trained.sum())
    weights = torch.rand(len(case.lengths), dtype=torch.float64)
    weighted = (per_token * weights[:, None]).sum() / case.trained.sum()
    _assert_same(case, spec, weighted, importance_weights=weights)


def test_geometric_mean_against_autograd() -> None:
    case = make_case(seed=2)
    spec = PolicyLossSpec(loss_type="geo_mean", epsilon=LOW, epsilon_high=HIGH)
    sign = case.advantages.sign()[:, None]
    log_ratio = case.logprobs - case.old
    tighter = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-LOW, HIGH))
    ratio = ((tighter * case.trained).sum(-1) / case.trained.sum(-1)).exp()
    _assert_same(case, spec, (-case.advantages * ratio).mean())


def test_tokens_that_a_geometric_mean_clips_are_counted() -> None:
    batch = {
        "advantages": torch.tensor([1.0, -1.0]),
        "cu_seqlens": torch.tensor([0, 3, 6]),
        "old_logprobs": torch.full((6,), -2.0),
    }
    moved = torch.tensor([HIGH + 0.1, -LOW - 0.1, 0.0, HIGH + 0.1, -LOW - 0.1, 0.0])
    spec = PolicyLossSpec(loss_type="geo_mean", epsilon=LOW, epsilon_high=HIGH)
    logprobs = (moved - 2).requires_grad_()
    out = policy_loss(logprobs, spec=spec, **batch)
    out.loss.backward()
    assert out.metrics["clip_ratio/high"] == out.metrics["clip_ratio/low"] == pytest.approx(1 / 6)
    assert out.metrics["clip_ratio/region"] == pytest.approx(2 / 6)
    assert (logprobs.grad == 0).tolist() == [True, False, False, False, True, False]


def test_sequence_ratio_with_token_slopes_against_autograd() -> None:
    case = make_case(seed=2, spread=0.8)
    spec = PolicyLossSpec(loss_type="gspo", importance_sampling_level="sequence_token")
    log_ratio = ((case.logprobs - case.old) * case.trained).sum(-1) / case.trained.sum(-1)
    ratio = (case.logprobs - case.logprobs.detach() + log_ratio.detach()[:, None]).exp()
    a = case.advantages[:, None]
    loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * case.trained
    _assert_same(case, spec, (loss.sum(-1) / case.trained.sum(-1)).mean())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs", "k1+", "k3+"])
@pytest.mark.parametrize("corrected", [False, True])
def test_kl_estimators_against_autograd(estimator: str, corrected: bool) -> None:
    case = make_case(seed=4)
    d = case.logprobs - case.ref
    values = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d, "abs": d.abs()}
    value = values[estimator.removesuffix("+")]
    if estimator.endswith("+"):
        value = value.detach() + d**2 / 2 - (d**2 / 2).detach()
    if corrected:
        value = value * (case.logprobs - case.old).exp()
    policy = -case.advantages[:, None] * case.logprobs
    spec = PolicyLossSpec(
        loss_type="reinforce", beta=0.4, kl_estimator=estimator, use_bias_correction_kl=corrected
    )
    expected = ((policy + 0.4 * value) * case.trained).sum() / case.trained.sum()
    _assert_same(case, spec, expected)
