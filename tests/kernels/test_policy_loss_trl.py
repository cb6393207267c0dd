"""Every policy loss that TRL has, against TRL's own GRPOTrainer._compute_loss."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from policy_cases import Case, make_case
from torch.testing import assert_close

from polymath_fast.kernels import PolicyLossSpec, importance_weights, policy_loss

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
GRPOTrainer = grpo_trainer.GRPOTrainer
MAX_LENGTH = 11


class _Trainer(SimpleNamespace):
    """What `_compute_loss` reads of a trainer: one process, one micro-batch, log-probs given."""

    get_high_entropy_mask = GRPOTrainer.get_high_entropy_mask
    get_off_policy_mask = staticmethod(GRPOTrainer.get_off_policy_mask)
    get_gamma_weights = staticmethod(GRPOTrainer.get_gamma_weights)

    def __init__(self, case: Case, spec: PolicyLossSpec, weights: torch.Tensor | None) -> None:
        accelerator = SimpleNamespace(
            num_processes=1,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            pad_across_processes=lambda x, **_: x,
        )
        loss_type = "grpo" if spec.loss_type == "gspo" else spec.loss_type
        super().__init__(
            _get_per_token_logps_and_entropies=lambda *a, **k: (case.logprobs, case.entropy, None),
            args=SimpleNamespace(
                delta=spec.delta,
                use_bias_correction_kl=spec.use_bias_correction_kl,
                steps_per_generation=1,
                sapo_temperature_pos=spec.sapo_temperature_pos,
                sapo_temperature_neg=spec.sapo_temperature_neg,
                vespo_k_pos=spec.vespo_k_pos,
                vespo_lambda_pos=spec.vespo_lambda_pos,
                vespo_k_neg=spec.vespo_k_neg,
                vespo_lambda_neg=spec.vespo_lambda_neg,
            ),
            accelerator=accelerator,
            model=SimpleNamespace(training=True),
            aux_loss_enabled=False,
            top_entropy_quantile=spec.top_entropy_quantile,
            off_policy_mask_threshold=spec.off_policy_mask_threshold,
            importance_sampling_level="sequence" if spec.level == "sequence" else "token",
            beta=spec.beta,
            loss_type=loss_type,
            epsilon_low=spec.epsilon,
            epsilon_high=spec.upper_epsilon,
            use_vllm=weights is not None,
            vllm_importance_sampling_correction=weights is not None,
            current_gradient_accumulation_steps=1,
            max_completion_length=MAX_LENGTH,
            _entropy_bonus_enabled=spec.entropy_coef != 0,
            use_adaptive_entropy=False,
            entropy_coef=spec.entropy_coef,
            _metrics={"train": defaultdict(list)},
        )
        self.accelerator.sync_gradients = True


def _trl(case: Case, spec: PolicyLossSpec, weights: torch.Tensor | None) -> tuple:
    trainer = _Trainer(case, spec, weights)
    empty = torch.zeros(len(case.lengths), 0)
    inputs = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": torch.zeros_like(case.trained),
        "completion_mask": case.trained,
        "advantages": case.advantages,
        "old_per_token_logps": case.old,
        "ref_per_token_logps": case.ref,
        "sampling_per_token_logps": case.sampling,
        "num_items_in_batch": case.trained.sum(),
    }
    if weights is not None:
        inputs["importance_sampling_ratio"] = weights
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    gradients = torch.autograd.grad(loss, (case.logprobs, case.entropy), allow_unused=True)
    return loss.detach(), gradients, trainer._metrics["train"]


OPTIONS = {
    "plain": {},
    "kl": {"beta": 0.3},
    "kl bias-corrected": {"beta": 0.3, "use_bias_correction_kl": True},
    "entropy bonus": {"entropy_coef": 0.05},
    "top entropy": {"top_entropy_quantile": 0.4, "entropy_coef": 0.05},
    "off-policy mask": {"off_policy_mask_threshold": 0.05},
    "sequence ratio": {"importance_sampling_level": "sequence", "beta": 0.3},
    "sequence ratio, bias-corrected": {
        "importance_sampling_level": "sequence",
        "beta": 0.3,
        "use_bias_correction_kl": True,
    },
    "two-sided": {"delta": 1.4, "epsilon_high": 0.28, "epsilon": 0.15},
    "two-sided, the tighter bound": {"delta": 1.1, "epsilon_high": 0.28, "epsilon": 0.15},
}
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "gspo")


def _spec(loss_type: str, options: dict) -> PolicyLossSpec | None:
    """None where the options do not belong to the loss."""
    extra = {"max_completion_length": MAX_LENGTH, "log_ratio_clamp": None}
    if loss_type == "cispo":
        extra["epsilon_high"] = 1.2
    try:
        return PolicyLossSpec(loss_type=loss_type, **{**extra, **options})
    except ValueError:
        return None


CASES = {
    (loss_type, name): spec
    for loss_type in LOSSES
    for name, options in OPTIONS.items()
    if (spec := _spec(loss_type, options)) is not None
}


def test_grid_covers_every_loss_with_most_options() -> None:
    refused = {key for key in ((a, b) for a in LOSSES for b in OPTIONS) if key not in CASES}
    assert {loss_type for loss_type, _ in refused} == {"cispo", "sapo", "vespo"}
    assert {name for _, name in refused} == {
        "two-sided",
        "two-sided, the tighter bound",
        "sequence ratio",
        "sequence ratio, bias-corrected",
    }


@pytest.mark.parametrize("spec", CASES.values(), ids=[", ".join(key) for key in CASES])
def test_agrees_with_trl(spec: PolicyLossSpec) -> None:
    case = make_case(seed=3)
    loss, (by_logprob, by_entropy), metrics = _trl(case, spec, None)
    _assert_same(case, spec, loss, by_logprob, by_entropy, {})
    out = policy_loss(
        case.pack(case.logprobs), entropy=case.pack(case.entropy), spec=spec, **case.inputs()
    )
    # TRL looks for clipped ratios after delta has cut them
    if spec.level == "token" and (spec.delta is None or spec.delta > spec.clip_high):
        pairs = {"kl": "kl", "entropy": "entropy", "clip_ratio/region_mean": "clip_ratio/region"}
        for theirs, ours in pairs.items():
            if theirs in metrics:
                assert metrics[theirs][0] == pytest.approx(float(out.metrics[ours]), abs=1e-12)


@pytest.mark.parametrize(
    ("loss_type", "mode"),
    [
        ("dapo", "token_truncate"),
        ("grpo", "token_mask"),
        ("dapo", "sequence_truncate"),
        ("grpo", "sequence_mask"),
        ("vespo", "token_truncate"),
    ],
)
def test_sampling_corrections_agree_with_trl(loss_type: str, mode: str) -> None:
    case = make_case(seed=5)
    weights = importance_weights(
        case.pack(case.old),
        case.pack(case.sampling),
        case.cu_seqlens,
        mask=case.pack(case.trained).bool(),
        mode=mode,
        clip_max=1.3,
        clip_min=0.6,
    )
    difference = (case.old - case.sampling) * case.trained
    if mode.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    ratio = difference.exp()
    inside = (ratio >= 0.6) & (ratio <= 1.3)
    expected = ratio.clamp(0.6, 1.3) if mode.endswith("truncate") else ratio * inside
    packed = expected[:, 0] if mode.startswith("sequence") else case.pack(expected)
    assert_close(weights, packed)
    assert 0 < inside[case.inside[:, : inside.shape[1]]].double().mean() < 1

    spec = PolicyLossSpec(loss_type=loss_type, log_ratio_clamp=None)
    loss, (by_logprob, _), _ = _trl(case, spec, expected)
    _assert_same(case, spec, loss, by_logprob, None, {"importance_weights": weights})
    inner = PolicyLossSpec(
        loss_type=loss_type,
        log_ratio_clamp=None,
        importance_sampling_mode=mode,
        importance_sampling_clip_max=1.3,
        importance_sampling_clip_min=0.6,
    )
    _assert_same(case, inner, loss, by_logprob, None, {})


def _assert_same(
    case: Case,
    spec: PolicyLossSpec,
    loss: torch.Tensor,
    by_logprob: torch.Tensor,
    by_entropy: torch.Tensor | None,
    extra: dict,
) -> None:
    out = policy_loss(
        case.pack(case.logprobs),
        entropy=case.pack(case.entropy),
        spec=spec,
        **case.inputs(),
        **extra,
    )
    ours = torch.autograd.grad(out.loss, (case.logprobs, case.entropy), allow_unused=True)
    assert by_logprob.abs().max() > 1e-3
    assert_close(out.loss.detach(), loss)
    assert_close(ours[0], by_logprob)
    if spec.entropy_coef:
        assert_close(ours[1], by_entropy)
