"""verl's policy losses and KL estimators on our table, against formulas and verl's own code."""

from __future__ import annotations

from importlib.metadata import version
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from verl_formulas import (
    AGGREGATIONS,
    OF_POLICY_LOSS,
    Batch,
    Config,
    clip_cov_candidates,
    loss_by_formula,
    run_loss,
)

from polymath_fast.integrations.verl.losses import LOSS_MODES, loss_spec, policy_loss_fn
from polymath_fast.kernels import PolicyLossSpec, policy_loss


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(3, 6, 9, generator=generator, dtype=torch.float64)
    log_prob = -normal[0].abs() - 0.05
    lengths = torch.tensor([9, 4, 1, 7, 6, 0])  # one completion is masked out as a whole
    advantages = torch.tensor([1.2, -0.8, 0.5, -1.5, 0.0, 2.0], dtype=torch.float64)
    return Batch(
        log_prob=log_prob.requires_grad_(),
        old=(log_prob.detach() + 0.5 * normal[1]).clamp(max=-1e-3),
        advantages=advantages[:, None].expand(6, 9).clone(),
        mask=torch.arange(9)[None] < lengths[:, None],
        weights=normal[2].abs() + 0.2,
    )


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("mode", LOSS_MODES)
def test_losses_agree_with_the_formulas(batch: Batch, mode: str, weighted: bool) -> None:
    config = Config()
    for how in AGGREGATIONS:
        loss, gradient, _ = run_loss(policy_loss_fn(mode), how, batch, config, weighted)
        expected = loss_by_formula(mode, how, batch, config, weighted)
        assert_close(loss, expected.detach())
        expected_gradient = torch.autograd.grad(expected, batch.log_prob)[0]
        assert expected_gradient.abs().max() > 1e-3
        assert_close(gradient, expected_gradient, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("mode", ["vanilla", "gspo", "dro"])
def test_steps_over_several_ranks(batch: Batch, mode: str, how: str) -> None:
    info = {
        "dp_size": 4,
        "batch_num_tokens": 150,
        "global_batch_size": 32,
        "loss_scale_factor": 20,
    }
    config = Config(global_batch_info=info)
    loss, gradient, _ = run_loss(policy_loss_fn(mode), how, batch, config, False)
    expected = loss_by_formula(mode, how, batch, config, False)
    assert_close(loss, expected.detach())
    assert_close(gradient, torch.autograd.grad(expected, batch.log_prob)[0])


def test_values_of_tokens_stay_theirs_where_there_are_as_many_completions() -> None:
    """Four tokens of four completions, two of which are masked out."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]).bool()
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64)[:, None].expand(4, 3)
    log_prob = torch.full((4, 3), -1.0, dtype=torch.float64).requires_grad_()
    loss, _ = policy_loss_fn("vanilla")(
        log_prob.detach(), log_prob, advantages, mask, config=Config()
    )
    loss.backward()
    assert_close(loss.detach(), torch.tensor(-0.5, dtype=torch.float64))
    assert_close(log_prob.grad, torch.where(mask, -advantages / 4, 0))


def test_metrics_have_verls_names_and_meaning(batch: Batch) -> None:
    metrics = run_loss(policy_loss_fn("vanilla"), "token-mean", batch, Config(), False)[2]
    ratio = (batch.log_prob - batch.old).detach().exp()[batch.mask]
    advantages = batch.advantages[batch.mask]
    high, low = (ratio > 1.28) & (advantages > 0), (ratio < 0.85) & (advantages < 0)
    assert metrics["actor/pg_clipfrac"] == pytest.approx(float((high | low).double().mean()))
    ceiling = (ratio > 1.6) & (advantages < 0)
    assert metrics["actor/pg_clipfrac_lower"] == pytest.approx(float(ceiling.double().mean()))
    assert metrics["actor/ppo_kl"] == pytest.approx(float(-ratio.log().mean()))
    assert 0 < metrics["actor/pg_clipfrac_lower"] < metrics["actor/pg_clipfrac"] < 1


def test_a_clip_by_covariance_draws_its_share(batch: Batch) -> None:
    config = Config(policy_loss=SimpleNamespace(**OF_POLICY_LOSS | {"clip_cov_ratio": 0.12}))
    _, gradient, metrics = run_loss(policy_loss_fn("clip_cov"), "token-mean", batch, config, False)
    candidates = clip_cov_candidates(batch, config)
    chosen = candidates & (gradient == 0)
    assert chosen.sum() == int(0.12 * 27) < candidates.sum()
    assert metrics["actor/pg_clipfrac"] == pytest.approx(3 / 27)


def test_fields_that_are_left_out_are_verls(batch: Batch) -> None:
    fields = dict.fromkeys(OF_POLICY_LOSS)
    config = Config(policy_loss=SimpleNamespace(**fields))
    spec = loss_spec("kl_cov", "token-mean", config, batch.mask)
    assert (spec.kl_cov_ratio, spec.ppo_kl_coef) == (0.0002, 1.0)
    spec = loss_spec("clip_cov", "token-mean", config, batch.mask)
    assert (spec.clip_cov_ratio, spec.clip_cov_lb, spec.clip_cov_ub) == (0.0002, 1.0, 5.0)


def test_what_cannot_be_mapped_is_refused(batch: Batch) -> None:
    for mode in ("bypass_mode", "ppo"):
        with pytest.raises(ValueError, match=f"mode='{mode}'"):
            policy_loss_fn(mode)
    with pytest.raises(ValueError, match="aggregation='mean'"):
        run_loss(policy_loss_fn("vanilla"), "mean", batch, Config(), False)
    config = Config(global_batch_info={"dp_size": 2})
    with pytest.raises(ValueError, match="dp_size=2 needs batch_num_tokens"):
        run_loss(policy_loss_fn("vanilla"), "token-mean", batch, config, False)
    config = Config(policy_loss=SimpleNamespace(dro_beta=None))
    with pytest.raises(ValueError, match="needs dro_beta"):
        run_loss(policy_loss_fn("dro"), "token-mean", batch, config, False)


def _kl(estimator: str, difference: torch.Tensor) -> torch.Tensor:
    """verl's kl_penalty of `difference` = logprob - ref_logprob."""
    name = estimator.removesuffix("+")
    if name == "k3":
        clamped = (-difference).clamp(-20, 20)
        value = (clamped.exp() - clamped - 1).clamp(-10, 10)
    else:
        value = {"k1": difference, "k2": 0.5 * difference**2, "abs": difference.abs()}[name]
    if estimator == name:
        return value
    right_gradient = 0.5 * difference**2
    return right_gradient - right_gradient.detach() + value.detach()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs", "k1+", "k3+", "abs+"])
def test_kl_estimators(estimator: str) -> None:
    difference = torch.tensor([-30.0, -4.0, -0.7, 0.1, 0.9, 3.0, 25.0], dtype=torch.float64)
    logprobs = (-32 - torch.zeros(7, dtype=torch.float64)).requires_grad_()
    reference = logprobs.detach() - difference
    clamps = {"kl_max": 10.0} if estimator.startswith("k3") else {"log_ratio_clamp": None}
    out = policy_loss(
        logprobs,
        torch.zeros(1, dtype=torch.float64),
        torch.tensor([0, 7]),
        ref_logprobs=reference,
        spec=PolicyLossSpec(loss_type="gpg", beta=1.0, kl_estimator=estimator, **clamps),
    )
    expected = _kl(estimator, logprobs - reference).mean()
    assert_close(out.loss.detach(), expected.detach())
    ours, theirs = (torch.autograd.grad(x, logprobs)[0] for x in (out.loss, expected))
    assert_close(ours, theirs)


@pytest.mark.parametrize("mode", LOSS_MODES)
def test_agrees_with_verls_own_functions(verl: ModuleType, batch: Batch, mode: str) -> None:
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    for info in ({}, {"dp_size": 4, "batch_num_tokens": 150, "global_batch_size": 32}):
        config = FSDPActorConfig(
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=1,
            clip_ratio_low=0.15,
            clip_ratio_high=0.28,
            clip_ratio_c=1.6,
            tau_neg=1.2,
            policy_loss=PolicyLossConfig(**OF_POLICY_LOSS),
            global_batch_info=info,
        )
        for how in AGGREGATIONS:
            for weighted in (False, True):
                case = (how, batch, config, weighted)
                ours = policy_loss_fn(mode, version("verl"))
                loss, gradient, metrics = run_loss(ours, *case)
                theirs, expected, reported = run_loss(verl.get_policy_loss_fn(mode), *case)
                assert_close(loss, theirs)
                assert_close(gradient, expected, atol=1e-8, rtol=1e-6)
        names = ["actor/ppo_kl", "actor/pg_clipfrac_lower"]
        names += ["actor/pg_clipfrac"] if mode == "clip_cov" else []
        for name in names:
            if name in metrics:
                assert metrics[name] == pytest.approx(reported[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_agrees_with_verls_own_function_on_an_equal_draw(
    verl: ModuleType, batch: Batch, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    config = FSDPActorConfig(
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=0.15,
        clip_ratio_high=0.28,
        policy_loss=PolicyLossConfig(**OF_POLICY_LOSS | {"clip_cov_ratio": 0.12}),
    )
    values = (batch.log_prob.detach(), batch.old, batch.advantages, batch.mask, batch.weights)
    log_prob, old, advantages, mask, weights = (value.to(dtype) for value in values)
    batch = Batch(log_prob.requires_grad_(), old, advantages, mask.bool(), weights)
    loss, gradient, metrics = run_loss(
        policy_loss_fn("clip_cov"), "token-mean", batch, config, True
    )
    candidates = clip_cov_candidates(batch, config)
    drawn = (gradient == 0)[candidates]
    assert 1 < drawn.sum() == int(0.12 * 27) < len(drawn)
    order = torch.cat([drawn.nonzero(), (~drawn).nonzero()]).flatten()
    monkeypatch.setattr(torch, "randperm", {len(order): order}.__getitem__)
    theirs = verl.get_policy_loss_fn("clip_cov")
    expected, slopes, reported = run_loss(theirs, "token-mean", batch, config, True)
    assert_close(loss, expected)
    assert_close(gradient, slopes)
    assert metrics == pytest.approx(reported)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs", "k1+", "k3+", "abs+"])
def test_formula_of_the_kl_is_verls(verl: ModuleType, estimator: str) -> None:
    difference = torch.tensor([-30.0, -0.7, 0.1, 3.0], dtype=torch.float64).requires_grad_()
    zero = torch.zeros(4, dtype=torch.float64)
    ours, theirs = _kl(estimator, difference), verl.kl_penalty(difference, zero, estimator)
    assert_close(ours, theirs)
    gradients = [torch.autograd.grad(x.sum(), difference)[0] for x in (ours, theirs)]
    assert_close(*gradients)
