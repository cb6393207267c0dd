"""Policy losses of values out of bounds, and options and inputs that are refused."""

from __future__ import annotations

import pytest
import torch
from policy_cases import loss_and_gradient, make_case
from torch.testing import assert_close

from polymath_fast.kernels import PolicyLossSpec, importance_weights, policy_loss


def test_overflow_at_untrained_tokens_leaves_no_trace() -> None:
    case = make_case(seed=9)
    spec = PolicyLossSpec(loss_type="grpo", beta=0.1, log_ratio_clamp=None)
    clean = loss_and_gradient(case, spec)
    case.old = torch.where(case.trained > 0, case.old, -2000.0)
    case.ref = torch.where(case.trained > 0, case.ref, 2000.0)
    for got, expected in zip(loss_and_gradient(case, spec), clean, strict=True):
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
    "no token to clip": {"loss_type": "clip_cov", "clip_cov_ratio": 0.0},
    "more than all tokens": {"loss_type": "kl_cov", "kl_cov_ratio": 1.5},
    "nan share": {"loss_type": "kl_cov", "kl_cov_ratio": float("nan")},
    "bounds the wrong way round": {"loss_type": "clip_cov", "clip_cov_ub": 2, "clip_cov_lb": 5},
    "no room between bounds": {"loss_type": "clip_cov", "clip_cov_lb": 5.0},
    "nan bound": {"loss_type": "clip_cov", "clip_cov_ub": float("nan")},
    "negative penalty": {"loss_type": "kl_cov", "ppo_kl_coef": -0.1},
    "infinite penalty": {"loss_type": "kl_cov", "ppo_kl_coef": float("inf")},
    "penalty that nothing reads": {"loss_type": "clip_cov", "ppo_kl_coef": 1.0},
    "clip of kl_cov": {"loss_type": "kl_cov", "epsilon": 0.3},
    "choice of completions": {"loss_type": "kl_cov", "importance_sampling_level": "sequence"},
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


@pytest.mark.parametrize("cuts", [[1, 3], [0, 2], [0, 4, 3], []], ids=str)
def test_importance_weights_refuse_offsets_that_do_not_fit(cuts: list[int]) -> None:
    values = torch.zeros(3)
    with pytest.raises(ValueError, match="cu_seqlens"):
        importance_weights(values, values, torch.tensor(cuts, dtype=torch.int32))


def test_tokens_without_a_completion_are_refused() -> None:
    with pytest.raises(ValueError, match="no completion for the 3 tokens"):
        policy_loss(torch.zeros(3), torch.zeros(0), torch.tensor([0]))
