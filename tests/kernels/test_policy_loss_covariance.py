"""Losses that choose tokens by their covariance of log-prob and advantage, against autograd through
their formulas, and what they choose."""

from __future__ import annotations

import math

import pytest
import torch
from policy_cases import Case, loss_and_gradient, make_case
from torch import Tensor
from torch.testing import assert_close

from polymath_fast.kernels import PolicyLossOutput, PolicyLossSpec, grpo_loss, policy_loss
from polymath_fast.kernels.policy_loss.covariance import drawn_between

LOW, HIGH = 0.15, 0.25
CLIP = {"loss_type": "clip_cov", "epsilon": LOW, "epsilon_high": HIGH}
KL = PolicyLossSpec(loss_type="kl_cov", kl_cov_ratio=0.3, ppo_kl_coef=0.7)


def covariance(case: Case) -> Tensor:
    """(B, T), 0 where nothing is trained."""
    count = case.trained.sum()
    a, x = case.advantages[:, None] * case.trained, case.logprobs.detach() * case.trained
    return (a - a.sum() / count) * (x - x.sum() / count) * case.trained


def clipped(case: Case) -> tuple[Tensor, Tensor]:
    """(B, T) PPO's loss, and where a bound took its gradient."""
    ratio, a = (case.logprobs - case.old).exp(), case.advantages[:, None]
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - LOW, 1 + HIGH))
    return loss, ((a > 0) & (ratio > 1 + HIGH)) | ((a < 0) & (ratio < 1 - LOW))


def assert_same(case: Case, spec: PolicyLossSpec, per_token: Tensor, chosen: Tensor) -> None:
    """Values, gradients and the metric, without and with weights of completions."""
    weights = torch.rand(len(case.lengths), dtype=torch.float64) + 0.5
    for extra in ({}, {"importance_weights": weights}):
        weighted = per_token * weights[:, None] if extra else per_token
        expected = (weighted * case.trained).sum() / case.trained.sum()
        (gradient,) = torch.autograd.grad(expected, case.logprobs, retain_graph=True)
        loss, ours = loss_and_gradient(case, spec, **extra)
        assert_close(loss, expected.detach())
        assert_close(ours, gradient)
    metrics = policy_loss(case.pack(case.logprobs), spec=spec, **case.inputs()).metrics
    assert_close(metrics["covariance/chosen_share"], chosen.sum() / case.trained.sum())


def test_kl_cov_against_autograd() -> None:
    case = make_case(seed=1)
    found, trained = covariance(case), case.trained.bool()
    count = int(KL.kl_cov_ratio * trained.sum().item())
    least = found[trained].sort(descending=True).values[count - 1]
    chosen = trained & (found >= least)
    assert 1 < chosen.sum() == count < trained.sum()
    log_ratio = case.logprobs - case.old
    per_token = -case.advantages[:, None] * log_ratio.exp() + 0.7 * chosen * log_ratio.abs()
    assert_same(case, KL, per_token, chosen)


def test_clip_cov_of_all_candidates_against_autograd() -> None:
    case = make_case(seed=4)
    spec = PolicyLossSpec(clip_cov_ratio=1.0, clip_cov_lb=0.2, clip_cov_ub=1.5, **CLIP)
    loss, out_of_bounds = clipped(case)
    found = covariance(case)
    within = (found > 0.2) & (found < 1.5)
    chosen = within & ~out_of_bounds
    assert chosen.any() and (within & out_of_bounds).any() and (found >= 1.5).any()
    assert_same(case, spec, loss * ~chosen, chosen)


def test_clip_cov_draws_as_many_candidates_as_asked_for() -> None:
    case = make_case(seed=3, completions=60, longest=40)
    spec = PolicyLossSpec(clip_cov_ratio=0.05, clip_cov_lb=0.1, clip_cov_ub=2.0, **CLIP)
    per_token, out_of_bounds = clipped(case)
    candidates = (covariance(case) > 0.1) & (covariance(case) < 2.0) & ~out_of_bounds
    _, gradient = loss_and_gradient(case, spec)
    chosen = (gradient == 0) & case.trained.bool() & ~out_of_bounds
    count = math.floor(0.05 * case.trained.sum().item())
    assert 20 < chosen.sum() == count < candidates.sum()
    assert (candidates | ~chosen).all()
    assert_same(case, spec, per_token * ~chosen, chosen)
    rounded = case.pack(case.logprobs).detach().float()
    again = policy_loss(rounded.requires_grad_(), spec=spec, **case.inputs())
    again.loss.backward()
    assert torch.equal(rounded.grad == 0, case.pack(gradient) == 0)


def test_draws_are_spread_over_the_batch_and_over_batches() -> None:
    """A fifth of 100 to 599 tokens: each tenth of them gets its share, and each place its turn."""
    tenths, turns = torch.zeros(10), torch.zeros(100)
    for count in range(100, 600):
        values, everything = torch.zeros(count).double(), torch.ones(count).bool()
        chosen = drawn_between(values, everything, -1.0, 1.0, 0.2)
        assert chosen.sum() == int(0.2 * count)
        places = chosen.nonzero().flatten()
        tenths += torch.bincount(places * 10 // count, minlength=10) / len(places)
        turns += chosen[:100]
    assert (tenths / 500 - 0.1).abs().max() < 0.01
    # five deviations of 500 coins that fall on one side in a fifth of all throws
    assert (turns / 500 - 0.2).abs().max() < 5 * math.sqrt(0.2 * 0.8 / 500)


def run(logprobs: list[float], spec: PolicyLossSpec, **given: object) -> tuple:
    """Of one completion; with `advantages` (N,)."""
    values = torch.tensor(logprobs, requires_grad=True)
    offsets = torch.tensor([0, len(logprobs)], dtype=torch.int32)
    given.setdefault("advantages", torch.linspace(-1, 1, len(logprobs)))
    out = policy_loss(values, cu_seqlens=offsets, spec=spec, **given)
    out.loss.backward()
    return out, values.grad


def test_of_equal_covariances_the_earlier_token_is_chosen() -> None:
    spec = PolicyLossSpec(loss_type="kl_cov", kl_cov_ratio=0.4, ppo_kl_coef=1.0)
    given = {"advantages": torch.tensor([-1.0, 1.0, 1.0, 1.0, -1.0])}
    old = torch.full((5,), -2.0)
    _, gradient = run([-1.0] * 5, spec, old_logprobs=old, **given)
    # equal log-probs: every covariance is 0
    paid = 5 * gradient + math.e * given["advantages"]
    assert_close(paid, torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]), atol=1e-6, rtol=0)
    _, gradient = run([-3.0, -1.0, -1.0, -1.0, -3.0], spec, old_logprobs=old, **given)
    ratio = (torch.tensor([-3.0, -1.0, -1.0, -1.0, -3.0]) - old).exp()
    paid = 5 * gradient + ratio * given["advantages"]
    assert_close(paid.abs().round(), torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0]))


def test_on_policy_a_ratio_of_one_costs_nothing() -> None:
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.0])
    for old in (None, torch.tensor([-1.0, -3.0, -0.1, -2.0])):
        given = {"advantages": advantages, "old_logprobs": old}
        out, gradient = run([-1.0, -3.0, -0.1, -2.0], KL, **given)
        assert_close(gradient, -advantages / 4)
        assert out.metrics["covariance/chosen_share"] == 0.25
        spec = PolicyLossSpec(clip_cov_ratio=1.0, **CLIP)
        out, gradient = run([-1.0, -3.0, -0.1, -2.0], spec, **given)
        # (2 - 0.375) (-0.1 + 1.525) is above 1, and so is (-0.5 - 0.375) (-3 + 1.525)
        assert_close(gradient, torch.tensor([-0.25, 0.0, 0.0, 0.25]))
        assert_close(out.loss.detach(), torch.tensor(0.0))


@pytest.mark.parametrize("loss_type", ["clip_cov", "kl_cov"])
def test_nothing_or_one_token_to_train(loss_type: str) -> None:
    spec = PolicyLossSpec(loss_type=loss_type)
    nothing = {"mask": torch.zeros(3).bool(), "old_logprobs": torch.full((3,), torch.nan)}
    out, gradient = run([-1.0, math.nan, -2.0], spec, **nothing)
    assert out.loss == 0 and not gradient.any()
    assert out.metrics["covariance/chosen_share"] == 0
    out, gradient = run([-1.0], spec, old_logprobs=torch.tensor([-1.1]))
    ratio = math.exp(0.1)  # its advantage is -1 and its covariance 0
    chosen = loss_type == "kl_cov"
    assert out.metrics["covariance/chosen_share"] == chosen
    assert_close(out.loss.detach(), torch.tensor(ratio + 0.1 * 0.1 * chosen))
    assert_close(gradient, torch.tensor([ratio + 0.1 * chosen]))
    empty = policy_loss(
        torch.zeros(0), torch.zeros(0), torch.zeros(1, dtype=torch.int32), spec=spec
    )
    assert empty.loss == 0


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("spec", [KL, PolicyLossSpec(clip_cov_ratio=1.0, clip_cov_lb=0.1, **CLIP)])
def test_a_row_without_logprob_chooses_for_nobody(spec: PolicyLossSpec, bad: float) -> None:
    def differentiated(second: float, **given: Tensor) -> tuple[PolicyLossOutput, Tensor]:
        old = torch.tensor([-1.2, -1.0, -0.5, -2.2, -0.3, -0.6])
        return run([-1.0, second, -0.4, -2.0, -0.2, -0.7], spec, old_logprobs=old, **given)

    out, gradient = differentiated(bad)
    expected, others = differentiated(-1.0, mask=torch.tensor([1, 0, 1, 1, 1, 1]).bool())
    assert out.metrics["nonfinite_rows"] == 1
    assert_close(gradient * 6, others * 5)
    shares = [x.metrics["covariance/chosen_share"] * x.metrics["tokens"] for x in (out, expected)]
    assert shares[0] == shares[1] > 0


@pytest.mark.parametrize("spec", [KL, PolicyLossSpec(clip_cov_ratio=1.0, clip_cov_lb=0.1, **CLIP)])
def test_a_chosen_token_without_an_old_logprob_still_shows(spec: PolicyLossSpec) -> None:
    logprobs, old = [-3.0, -2.0, -0.1, -0.2], torch.tensor([-3.0, -2.0, -0.1, -0.2])
    clean, gradient = run(logprobs, spec, old_logprobs=old)
    assert clean.metrics["covariance/chosen_share"] > 0
    old[0] = math.nan  # its covariance is the largest
    out, found = run(logprobs, spec, old_logprobs=old)
    assert out.loss.isnan()
    assert found[0] == 0 and torch.equal(found[1:], gradient[1:])


@pytest.mark.parametrize("loss_type", ["clip_cov", "kl_cov"])
def test_any_number_of_threads_chooses_alike(loss_type: str) -> None:
    count, before = 70_001, torch.get_num_threads()
    logits, targets = torch.randn(count, 5), torch.randint(5, (count,))
    offsets = torch.tensor([0, count // 3, count], dtype=torch.int32)
    spec = PolicyLossSpec(
        loss_type=loss_type, **({"clip_cov_lb": 0.1} if "clip" in loss_type else {})
    )
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaf = logits.clone().requires_grad_()
            old = torch.full((count,), -1.6)
            out = grpo_loss(
                leaf, targets, torch.tensor([1.0, -1.0]), offsets, old_logprobs=old, spec=spec
            )
            out.loss.backward()
            assert out.metrics["covariance/chosen_share"] > 0
            found.append((out.loss.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    assert_close(found[1], found[0], rtol=0, atol=0)
