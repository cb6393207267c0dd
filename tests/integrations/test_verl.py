"""verl's policy losses and KL estimators on our table, against verl's formulas and, where verl can
be imported, its own functions; our LM head behind verl's two interfaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from polymath_fast.integrations.verl import FusedLinearForPPO, linear_cross_entropy
from polymath_fast.integrations.verl.losses import LOSS_MODES, policy_loss_fn
from polymath_fast.kernels import PolicyLossSpec, policy_loss

AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)


@dataclass
class Config:
    """The fields of verl's ActorConfig that its losses read."""

    clip_ratio: float = 0.2
    clip_ratio_low: float | None = 0.15
    clip_ratio_high: float | None = 0.28
    clip_ratio_c: float = 1.6
    tau_pos: float = 1.0
    tau_neg: float = 1.2
    policy_loss: Any = field(default_factory=lambda: SimpleNamespace(dro_beta=0.3))
    global_batch_info: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


@dataclass
class Batch:
    """(B, T) each, fp64."""

    log_prob: torch.Tensor
    old: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor


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


def _aggregate(values: torch.Tensor, mask: torch.Tensor, how: str, info: dict) -> torch.Tensor:
    """verl's agg_loss."""
    mask, size = mask.double(), info.get("dp_size", 1)
    tokens = info.get("batch_num_tokens") or mask.sum()
    lengths = mask.sum(-1)
    sequences = info.get("global_batch_size") or (lengths > 0).sum()
    by_sequence = (values * mask).sum(-1)
    return (
        size
        * {
            "token-mean": by_sequence.sum() / tokens,
            "token-sum": by_sequence.sum(),
            "seq-mean-token-mean": (by_sequence / (lengths + 1e-8)).sum() / sequences,
            "seq-mean-token-sum": by_sequence.sum() / sequences,
            "seq-mean-token-sum-norm": by_sequence.sum()
            / sequences
            / (info.get("loss_scale_factor") or mask.shape[-1]),
        }[how]
    )


def _clipped(b: Batch, config: Config, ratio: torch.Tensor) -> torch.Tensor:
    clamped = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    return torch.maximum(-b.advantages * ratio, -b.advantages * clamped)


def _vanilla(b: Batch, c: Config) -> torch.Tensor:
    loss = _clipped(b, c, (b.log_prob - b.old).exp())
    dual = torch.minimum(loss, -c.clip_ratio_c * b.advantages)
    return torch.where(b.advantages < 0, dual, loss)


def _gspo(b: Batch, c: Config) -> torch.Tensor:
    mean = ((b.log_prob - b.old) * b.mask).sum(-1) / b.mask.sum(-1).clamp(min=1)
    through_token = b.log_prob - b.log_prob.detach() + mean.detach()[:, None]
    return _clipped(b, c, through_token.exp())


def _dppo(b: Batch, c: Config, rose: torch.Tensor, fell: torch.Tensor) -> torch.Tensor:
    cut = torch.where(b.advantages > 0, rose, fell)
    ratio = (b.log_prob - b.old).exp().clamp(max=c.clip_ratio_c).detach()
    return -b.advantages * ratio * b.log_prob * ~cut


def _dppo_tv(b: Batch, c: Config) -> torch.Tensor:
    moved = (b.log_prob.exp() - b.old.exp()).detach()
    return _dppo(b, c, moved > c.clip_ratio_high, moved < -c.clip_ratio_low)


def _dppo_kl(b: Batch, c: Config) -> torch.Tensor:
    p, q = b.log_prob.detach().exp(), b.old.exp()
    kl = q * (q / p).log() + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
    return _dppo(b, c, (kl > c.clip_ratio_high) & (p > q), (kl > c.clip_ratio_low) & (p < q))


def _sapo(b: Batch, c: Config) -> torch.Tensor:
    tau = torch.where(b.advantages > 0, c.tau_pos, c.tau_neg)
    ratio = (b.log_prob - b.old).exp()
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * b.advantages


def _cispo(b: Batch, c: Config) -> torch.Tensor:
    ratio = (b.log_prob - b.old).exp().clamp(1 - c.clip_ratio_low, 1 + c.clip_ratio_high)
    return -ratio.detach() * b.advantages * b.log_prob


FORMULAS: dict[str, Callable[[Batch, Config], torch.Tensor]] = {
    "vanilla": _vanilla,
    "gspo": _gspo,
    "dppo_tv": _dppo_tv,
    "dppo_kl": _dppo_kl,
    "sapo": _sapo,
    "cispo": _cispo,
    "gpg": lambda b, c: -b.advantages * b.log_prob,
    "dro": lambda b, c: (
        0.5 * c.policy_loss.dro_beta * (b.log_prob - b.old).square() - b.advantages * b.log_prob
    ),
}
"""token losses, written down from research; geo_mean has no token loss"""


def _expected(mode: str, how: str, b: Batch, c: Config, weighted: bool) -> torch.Tensor:
    weights = b.weights if weighted else torch.ones_like(b.weights)
    if mode == "geo_mean":
        sign, log_ratio = b.advantages.sign(), b.log_prob - b.old
        clamped = log_ratio.clamp(-c.clip_ratio_low, c.clip_ratio_high)
        least = sign * torch.min(sign * log_ratio, sign * clamped)
        lengths = b.mask.sum(-1) + 1e-8
        ratio = ((least * b.mask).sum(-1) / lengths).exp()
        advantage = (b.advantages * b.mask).sum(-1) / lengths
        weight = (((weights + 1e-10).log() * b.mask).sum(-1) / lengths).exp()
        return (-advantage * ratio * weight).mean()
    if mode in ("gspo", "sapo"):
        how = "seq-mean-token-mean"
    return _aggregate(FORMULAS[mode](b, c) * weights, b.mask, how, c.global_batch_info)


def _run(function: Callable, how: str, b: Batch, c: Any, weighted: bool) -> tuple:
    loss, metrics = function(
        old_log_prob=b.old,
        log_prob=b.log_prob,
        advantages=b.advantages,
        response_mask=b.mask,
        loss_agg_mode=how,
        config=c,
        rollout_is_weights=b.weights if weighted else None,
    )
    return loss.detach(), torch.autograd.grad(loss, b.log_prob)[0], metrics


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("mode", LOSS_MODES)
def test_losses_agree_with_the_formulas(batch: Batch, mode: str, weighted: bool) -> None:
    config = Config()
    for how in AGGREGATIONS:
        loss, gradient, _ = _run(policy_loss_fn(mode), how, batch, config, weighted)
        expected = _expected(mode, how, batch, config, weighted)
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
    loss, gradient, _ = _run(policy_loss_fn(mode), how, batch, config, False)
    expected = _expected(mode, how, batch, config, False)
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
    metrics = _run(policy_loss_fn("vanilla"), "token-mean", batch, Config(), False)[2]
    ratio = (batch.log_prob - batch.old).detach().exp()[batch.mask]
    advantages = batch.advantages[batch.mask]
    high, low = (ratio > 1.28) & (advantages > 0), (ratio < 0.85) & (advantages < 0)
    assert metrics["actor/pg_clipfrac"] == pytest.approx(float((high | low).double().mean()))
    ceiling = (ratio > 1.6) & (advantages < 0)
    assert metrics["actor/pg_clipfrac_lower"] == pytest.approx(float(ceiling.double().mean()))
    assert metrics["actor/ppo_kl"] == pytest.approx(float(-ratio.log().mean()))
    assert 0 < metrics["actor/pg_clipfrac_lower"] < metrics["actor/pg_clipfrac"] < 1


def test_what_cannot_be_mapped_is_refused(batch: Batch) -> None:
    for mode in ("clip_cov", "kl_cov", "bypass_mode", "ppo"):
        with pytest.raises(ValueError, match=f"mode='{mode}'"):
            policy_loss_fn(mode)
    with pytest.raises(ValueError, match="aggregation='mean'"):
        _run(policy_loss_fn("vanilla"), "mean", batch, Config(), False)
    config = Config(global_batch_info={"dp_size": 2})
    with pytest.raises(ValueError, match="dp_size=2 needs batch_num_tokens"):
        _run(policy_loss_fn("vanilla"), "token-mean", batch, config, False)
    config = Config(policy_loss=SimpleNamespace(dro_beta=None))
    with pytest.raises(ValueError, match="needs dro_beta"):
        _run(policy_loss_fn("dro"), "token-mean", batch, config, False)


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


@pytest.fixture
def head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden (2, 4, 8), weight (33, 8), labels (2, 4)"""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 4, 8, generator=generator).requires_grad_()
    weight = torch.randn(33, 8, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(33, (2, 4), generator=generator)


def test_both_interfaces_of_the_head(head) -> None:
    hidden, weight, labels = head
    logprobs = ((hidden @ weight.T) / 0.7).log_softmax(-1)
    picked = logprobs.gather(-1, labels[..., None]).squeeze(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    (expected,) = torch.autograd.grad((picked + 0.3 * entropy).sum(), weight, retain_graph=True)
    module = FusedLinearForPPO(chunk_size=4)(hidden, weight, labels, temperature=0.7)
    flat = linear_cross_entropy(hidden, weight, labels, 0.7, "none")
    for found, shape in ((module, (2, 4)), (flat, (8,))):
        assert_close(found[0], picked.detach().reshape(shape))
        assert_close(found[1], entropy.detach().reshape(shape))
        (gradient,) = torch.autograd.grad((found[0] + 0.3 * found[1]).sum(), weight)
        assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert_close(linear_cross_entropy(hidden, weight, labels, 0.7, "mean")[0], picked.mean())


def test_labels_of_another_shape_are_refused(head) -> None:
    hidden, weight, labels = head
    with pytest.raises(ValueError, match=r"labels are \(4, 2\), hidden \(2, 4, 8\)"):
        FusedLinearForPPO()(hidden, weight, labels.T)


def test_a_split_vocabulary_is_refused(head) -> None:
    with pytest.raises(ValueError, match="dist_process_group"):
        linear_cross_entropy(*head, 1.0, "none", object())
    with pytest.raises(ValueError, match="reduction='max'"):
        linear_cross_entropy(*head, 1.0, "max")


@pytest.fixture
def verl() -> ModuleType:
    """verl's core_algos; needs ray, tensordict and hydra, which CI does not install."""
    return pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)


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
            policy_loss=PolicyLossConfig(dro_beta=0.3),
            global_batch_info=info,
        )
        for how in AGGREGATIONS:
            for weighted in (False, True):
                case = (how, batch, config, weighted)
                loss, gradient, metrics = _run(policy_loss_fn(mode), *case)
                theirs, expected, reported = _run(verl.get_policy_loss_fn(mode), *case)
                assert_close(loss, theirs)
                assert_close(gradient, expected, atol=1e-8, rtol=1e-6)
        for name in ("actor/ppo_kl", "actor/pg_clipfrac_lower"):
            if name in metrics:
                assert metrics[name] == pytest.approx(reported[name])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs", "k1+", "k3+", "abs+"])
def test_formula_of_the_kl_is_verls(verl: ModuleType, estimator: str) -> None:
    difference = torch.tensor([-30.0, -0.7, 0.1, 3.0], dtype=torch.float64).requires_grad_()
    zero = torch.zeros(4, dtype=torch.float64)
    ours, theirs = _kl(estimator, difference), verl.kl_penalty(difference, zero, estimator)
    assert_close(ours, theirs)
    gradients = [torch.autograd.grad(x.sum(), difference)[0] for x in (ours, theirs)]
    assert_close(*gradients)


def test_registered_and_patched_in_verl(verl: ModuleType, head) -> None:
    import verl.utils.experimental.torch_functional as in_torch
    import verl.utils.kernel.linear_cross_entropy as in_triton

    from polymath_fast.integrations.verl import patch_verl, register_losses

    assert verl.get_policy_loss_fn(register_losses()[0]).__name__ == "polymath_fast_vanilla"
    hidden, weight, labels = head
    theirs = in_torch.FusedLinearForPPO()(hidden, weight, labels, 0.7)
    before = in_torch.FusedLinearForPPO, in_triton.linear_cross_entropy
    with patch_verl():
        found = in_torch.FusedLinearForPPO()(hidden, weight, labels, 0.7)
        flat = in_triton.linear_cross_entropy(hidden, weight, labels, 0.7, "none")
    assert (in_torch.FusedLinearForPPO, in_triton.linear_cross_entropy) == before
    for mine, flattened, expected in zip(found, flat, theirs, strict=True):
        assert_close(mine, expected)
        assert_close(flattened, expected.flatten())
