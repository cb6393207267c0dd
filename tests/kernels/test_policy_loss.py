"""Policy losses against autograd through their published formulas, in fp64; options; edge cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from policy_cases import Case, make_case
from torch import Tensor
from torch.testing import assert_close

from polymath_fast.kernels import PolicyLossSpec, importance_weights, policy_loss

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


def _ours(case: Case, spec: PolicyLossSpec, **extra: Tensor) -> tuple[Tensor, Tensor]:
    inputs = {**case.inputs(), **extra}
    out = policy_loss(
        case.pack(case.logprobs), entropy=case.pack(case.entropy), spec=spec, **inputs
    )
    (gradient,) = torch.autograd.grad(out.loss, case.logprobs)
    return out.loss.detach(), gradient


def _assert_same(case: Case, spec: PolicyLossSpec, expected: Tensor, **extra: Tensor) -> None:
    (gradient,) = torch.autograd.grad(expected, case.logprobs, retain_graph=True)
    assert gradient.abs().max() > 1e-3
    loss, ours = _ours(case, spec, **extra)
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


AGGREGATIONS = {
    "token-mean": lambda per_token, trained: per_token.sum() / trained.sum(),
    "token-sum": lambda per_token, trained: per_token.sum(),
    "seq-mean-token-sum": lambda per_token, trained: per_token.sum(-1).mean(),
    "seq-mean-token-sum-norm": lambda per_token, trained: per_token.sum(-1).mean() / 9,
    "seq-mean-token-mean": lambda per_token, trained: (per_token.sum(-1) / trained.sum(-1)).mean(),
}


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_aggregations(how: str) -> None:
    case = make_case(seed=6)
    spec = PolicyLossSpec(
        loss_type="reinforce",
        aggregation=how,
        entropy_coef=0.1,
        entropy_aggregation=how,
        max_completion_length=9,
    )
    reduce = AGGREGATIONS[how]
    policy = -case.advantages[:, None] * case.logprobs * case.trained
    bonus = case.entropy * case.trained
    expected = reduce(policy, case.trained) - 0.1 * reduce(bonus, case.trained)
    out = policy_loss(
        case.pack(case.logprobs), entropy=case.pack(case.entropy), spec=spec, **case.inputs()
    )
    leaves = (case.logprobs, case.entropy)
    assert_close(out.loss.detach(), expected.detach())
    for ours, theirs in zip(
        torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert_close(ours, theirs)


def _divisor(spec: PolicyLossSpec, case: Case) -> float | None:
    if spec.token_aggregation == "token-mean":
        return float(case.trained.sum())
    return None if spec.token_aggregation == "token-sum" else float(len(case.lengths))


@pytest.mark.parametrize(
    "spec",
    [
        PolicyLossSpec(loss_type=name, **options)
        for name, options in {
            "dapo": {"entropy_coef": 0.1},
            "grpo": {"entropy_coef": 0.1, "beta": 0.2},
            "gspo": {"beta": 0.2, "use_bias_correction_kl": True},
            "dr_grpo": {"max_completion_length": 9},
            "luspo": {"importance_sampling_level": "sequence"},
            "vespo": {},
            "geo_mean": {},
            "bnpo": {"importance_sampling_mode": "sequence_mask"},
        }.items()
    ],
    ids=lambda spec: spec.loss_type,
)
def test_micro_batches_add_up_to_one_batch(spec: PolicyLossSpec) -> None:
    case = make_case(seed=7)
    whole_loss, whole = _ours(case, spec)
    spec = replace(
        spec,
        normalizer=_divisor(spec, case),
        entropy_normalizer=float(case.trained.sum()) if spec.entropy_coef else None,
    )
    total, gradient = torch.zeros(()).double(), torch.zeros_like(whole)
    for rows in (slice(0, 1), slice(1, 5), slice(5, 7)):
        part = Case(
            lengths=case.lengths[rows],
            trained=case.trained[rows],
            logprobs=case.logprobs.detach()[rows].requires_grad_(),
            old=case.old[rows],
            ref=case.ref[rows],
            sampling=case.sampling[rows],
            entropy=case.entropy.detach()[rows].requires_grad_(),
            advantages=case.advantages[rows],
        )
        loss, gradient[rows] = _ours(part, spec)
        total += loss
    assert_close(total, whole_loss)
    assert_close(gradient, whole)


def test_on_policy_ratio_is_one_with_gradient() -> None:
    case = make_case(seed=8)
    spec = PolicyLossSpec(loss_type="dapo")
    expected = -(case.advantages[:, None] * case.trained * case.logprobs).sum()
    expected = expected / case.trained.sum()
    (gradient,) = torch.autograd.grad(expected, case.logprobs)
    out = policy_loss(
        case.pack(case.logprobs),
        case.advantages,
        case.cu_seqlens,
        mask=case.pack(case.trained).bool(),
        spec=spec,
    )
    assert_close(torch.autograd.grad(out.loss, case.logprobs)[0], gradient)
    assert out.metrics["ratio/max"] == 1
    assert_close(
        out.loss.detach(), -(case.advantages * case.trained.sum(-1)).sum() / case.trained.sum()
    )


def test_overflow_at_untrained_tokens_leaves_no_trace() -> None:
    case = make_case(seed=9)
    spec = PolicyLossSpec(loss_type="grpo", beta=0.1, log_ratio_clamp=None)
    clean = _ours(case, spec)
    case.old = torch.where(case.trained > 0, case.old, -2000.0)
    case.ref = torch.where(case.trained > 0, case.ref, 2000.0)
    for got, expected in zip(_ours(case, spec), clean, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("jump", [1e3, -1e3])
def test_log_ratio_beyond_the_clamp_has_no_gradient(jump: float) -> None:
    old = torch.tensor([-1.0, -1.0 - jump, -1.0, -1.0 - jump])
    logprobs = torch.full((4,), -1.0, requires_grad=True)
    out = policy_loss(
        logprobs,
        torch.tensor([1.0, 1.0, -1.0, -1.0]),
        torch.tensor([0, 4], dtype=torch.int32),
        old_logprobs=old,
    )
    out.loss.backward()
    assert out.loss.isfinite()
    assert_close(logprobs.grad, torch.tensor([-0.25, 0.0, 0.25, 0.0]))


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_a_row_without_logprob_shouts_and_spares_the_others(bad: float) -> None:
    logprobs = torch.tensor([-1.0, bad, -2.0], requires_grad=True)
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    out = policy_loss(logprobs, torch.ones(1), offsets)
    out.loss.backward()
    assert out.loss.isnan()
    assert out.metrics["nonfinite_rows"] == 1
    assert_close(logprobs.grad, torch.tensor([-1 / 3, 0.0, -1 / 3]))
    mask = torch.tensor([True, False, True])
    out = policy_loss(logprobs, torch.ones(1), offsets, mask=mask)
    assert out.loss == -1
    assert out.metrics["nonfinite_rows"] == 0


@pytest.mark.parametrize(("offsets", "count"), [([0], 0), ([0, 0], 0), ([0, 0, 1, 1], 1)])
def test_empty_batches_and_completions(offsets: list[int], count: int) -> None:
    for loss_type in ("dapo", "grpo", "gspo", "geo_mean", "vespo"):
        logprobs = torch.full((count,), -0.5, requires_grad=True)
        out = policy_loss(
            logprobs,
            torch.full((len(offsets) - 1,), 2.0),
            torch.tensor(offsets, dtype=torch.int32),
            entropy=torch.ones(count),
            spec=PolicyLossSpec(loss_type=loss_type, entropy_coef=0.1),
        )
        out.loss.backward()
        assert out.loss.isfinite()
        assert logprobs.grad.isfinite().all()
        assert (out.loss != 0) == bool(count)
        assert all(value.isfinite() for value in out.metrics.values())


def test_nothing_trained_is_zero() -> None:
    logprobs = torch.tensor([-1.0, float("nan")], requires_grad=True)
    out = policy_loss(
        logprobs,
        torch.ones(1),
        torch.tensor([0, 2], dtype=torch.int32),
        mask=torch.zeros(2, dtype=torch.bool),
    )
    out.loss.backward()
    assert out.loss == 0
    assert torch.equal(logprobs.grad, torch.zeros(2))


def test_unknown_sampling_logprobs_count_as_equal() -> None:
    nan = float("nan")
    weights = importance_weights(
        torch.tensor([-1.0, -1.0, -2.0]),
        torch.tensor([-1.5, nan, nan]),
        torch.tensor([0, 2, 3], dtype=torch.int32),
        mode="sequence_truncate",
        clip_max=None,
    )
    assert_close(weights, torch.tensor([0.5, 0.0]).exp())


REFUSED = {
    "unknown loss": {"loss_type": "ppo2"},
    "unknown estimator": {"beta": 1.0, "kl_estimator": "k4"},
    "temperature": {"temperature": 0.0},
    "nan temperature": {"temperature": float("nan")},
    "negative epsilon": {"epsilon": -0.1},
    "delta that nothing reads": {"loss_type": "sapo", "delta": 2.0},
    "clip that nothing reads": {"loss_type": "reinforce", "epsilon": 0.3},
    "cispo without a bound": {"loss_type": "cispo"},
    "dro without beta": {"loss_type": "dro"},
    "dr_grpo without a length": {"loss_type": "dr_grpo"},
    "correction of a kl that is off": {"use_bias_correction_kl": True},
    "clip of weights that are off": {"importance_sampling_clip_max": 2.0},
    "level without a ratio": {"loss_type": "gpg", "importance_sampling_level": "sequence"},
    "sequence weights in vespo": {
        "loss_type": "vespo",
        "importance_sampling_mode": "sequence_mask",
    },
    "no divisor for the bonus": {"loss_type": "grpo", "normalizer": 8.0, "entropy_coef": 0.1},
    "quantile": {"top_entropy_quantile": 0.0},
    "normalizer": {"normalizer": 0.0},
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_are_refused_not_ignored(name: str) -> None:
    option = list(REFUSED[name])[-1]
    with pytest.raises(ValueError, match=option):
        PolicyLossSpec(**REFUSED[name])


def test_inputs_are_checked() -> None:
    x, a = torch.full((3,), -1.0), torch.ones(1)
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens"):
        policy_loss(x, a, torch.tensor([0, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match="cu_seqlens"):
        policy_loss(x, torch.ones(2), torch.tensor([0, 4, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match="advantages"):
        policy_loss(x, torch.ones(2), offsets)
    with pytest.raises(ValueError, match="mask"):
        policy_loss(x, a, offsets, mask=torch.ones(3))
    with pytest.raises(ValueError, match="ref_logprobs"):
        policy_loss(x, a, offsets, spec=PolicyLossSpec(beta=0.1))
    with pytest.raises(ValueError, match="sampling_logprobs"):
        policy_loss(x, a, offsets, spec=PolicyLossSpec(importance_sampling_mode="token_mask"))
    with pytest.raises(ValueError, match="twice"):
        policy_loss(
            x,
            a,
            offsets,
            sampling_logprobs=x,
            importance_weights=a,
            spec=PolicyLossSpec(importance_sampling_mode="token_mask"),
        )
    with pytest.raises(ValueError, match="entropy"):
        policy_loss(x, a, offsets, spec=PolicyLossSpec(entropy_coef=0.1))


def test_double_backward_is_refused() -> None:
    x = torch.full((3,), -1.0, requires_grad=True)
    loss = policy_loss(x, torch.ones(1), torch.tensor([0, 3], dtype=torch.int32)).loss
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_entropy_bonus_of_top_tokens_is_a_mean_over_them() -> None:
    case = make_case(seed=11)
    spec = PolicyLossSpec(loss_type="grpo", top_entropy_quantile=0.4, entropy_coef=0.1)
    divided = replace(
        spec, normalizer=float(len(case.lengths)), entropy_normalizer=float(case.trained.sum())
    )
    (loss, gradient), (other, other_gradient) = _ours(case, spec), _ours(case, divided)
    assert_close(other, loss)
    assert_close(other_gradient, gradient)


@pytest.mark.parametrize("cuts", [[1, 3], [0, 2], [0, 4, 3], []], ids=str)
def test_importance_weights_refuse_offsets_that_do_not_fit(cuts: list[int]) -> None:
    values = torch.zeros(3)
    with pytest.raises(ValueError, match="cu_seqlens"):
        importance_weights(values, values, torch.tensor(cuts, dtype=torch.int32))


def test_tokens_without_a_completion_are_refused() -> None:
    with pytest.raises(ValueError, match="no completion for the 3 tokens"):
        policy_loss(torch.zeros(3), torch.zeros(0), torch.tensor([0]))
