"""How policy losses sum up tokens: aggregations, micro-batches, empty and untrained batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from policy_cases import Case, loss_and_gradient, make_case
from torch.testing import assert_close

from polymath_fast.kernels import PolicyLossSpec, policy_loss

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
    whole_loss, whole = loss_and_gradient(case, spec)
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
        loss, gradient[rows] = loss_and_gradient(part, spec)
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


def test_entropy_bonus_of_top_tokens_is_a_mean_over_them() -> None:
    case = make_case(seed=11)
    spec = PolicyLossSpec(loss_type="grpo", top_entropy_quantile=0.4, entropy_coef=0.1)
    divided = replace(
        spec, normalizer=float(len(case.lengths)), entropy_normalizer=float(case.trained.sum())
    )
    (loss, gradient), (other, other_gradient) = (
        loss_and_gradient(case, spec),
        loss_and_gradient(case, divided),
    )
    assert_close(other, loss)
    assert_close(other_gradient, gradient)
