"""FastGRPOTrainer against GRPOTrainer: the same losses, gradients, weights and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from trl import GRPOTrainer  # noqa: E402
from trl_runs import Run, assert_same_run, rollouts, train  # noqa: E402

from polymath_fast.errors import UserError  # noqa: E402
from polymath_fast.integrations.trl import FastGRPOTrainer  # noqa: E402
from polymath_fast.integrations.trl.head import FusedHead  # noqa: E402

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
HIGH = {"cispo": {"epsilon_high": 1.05}}

OPTIONS: dict[str, dict[str, Any]] = {
    "one update a batch": {"num_iterations": 1, "gradient_accumulation_steps": 1, "beta": 0.1},
    "sequence ratio": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "beta": 0.1,
        "epsilon": 0.01,
    },
    "luspo as published": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "sapo by sequence": {"loss_type": "sapo", "importance_sampling_level": "sequence"},
    "two-sided clip": {"delta": 1.3, "epsilon": 0.05, "epsilon_high": 0.1},
    "KL without correction": {"beta": 0.2, "use_bias_correction_kl": False},
    "entropy bonus": {"loss_type": "grpo", "entropy_coef": 0.05},
    "top entropy": {"top_entropy_quantile": 0.4, "entropy_coef": 0.05},
    "adaptive entropy": {
        "use_adaptive_entropy": True,
        "entropy_coef": 0.01,
        "entropy_coef_delta": 0.02,
        "entropy_coef_max": 0.1,
        "entropy_target": 50.0,
    },
    "off-policy mask": {"off_policy_mask_threshold": 0.05},
    "off-policy mask, on-policy": {
        "off_policy_mask_threshold": 0.05,
        "num_iterations": 1,
        "without_sampler": True,
    },
    "tools": {"run_name": "tools", "beta": 0.1},
    "truncated left out": {"mask_truncated_completions": True, "loss_type": "grpo"},
    "as many tokens as completions": {
        "mask_truncated_completions": True,
        "sampled_by_vllm": True,
        "few": True,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 20.0,
    },
    "temperature, no scaling": {"temperature": 0.7, "scale_rewards": "none"},
    "head in float32": {"cast_lm_head_to_fp32": True},
    "padded to 16": {"pad_to_multiple_of": 16},
    "checkpointed": {"gradient_checkpointing": True},
    **{
        f"vLLM, {mode}": {
            "sampled_by_vllm": True,
            "vllm_importance_sampling_mode": mode,
            "vllm_importance_sampling_clip_max": 20.0,
            "vllm_importance_sampling_clip_min": 0.01,
        }
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    },
    "vLLM, vespo": {
        "sampled_by_vllm": True,
        "loss_type": "vespo",
        "vllm_importance_sampling_mode": "token_truncate",
        "off_policy_mask_threshold": 0.5,
    },
}


def _both(model: Any, folder: Path, vocab: int, eos: int, **options: Any) -> tuple[Run, Run]:
    without_sampler, few = options.pop("without_sampler", False), options.pop("few", False)
    runs = []
    for trainer in (FastGRPOTrainer, GRPOTrainer):
        generate = rollouts(vocab, eos)
        if few:
            generate = _few_tokens(eos)
        if without_sampler:
            generate = _without_logprobs(generate)
        here = model() if callable(model) else model
        runs.append(train(trainer, here, folder, rollout_func=generate, **options))
    return runs[0], runs[1]


def _few_tokens(eos: int) -> Any:
    """Of four completions one has one token, one has three, and two are cut."""
    ids = [[eos], [11, 12, eos], [13] * 8, [14] * 8]

    def generate(prompts: list, trainer: Any) -> dict[str, Any]:
        chosen = [ids[(i + i // 4) % 4] for i in range(len(prompts))]
        return {
            "prompt_ids": [[5, 6, 7] for _ in prompts],
            "completion_ids": chosen,
            "logprobs": [[-4.0 - place for place in range(len(each))] for each in chosen],
        }

    return generate


def _without_logprobs(generate: Any) -> Any:
    return lambda prompts, trainer: {**generate(prompts, trainer), "logprobs": None}


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type(tiny_model: Path, tmp_path: Path, loss_type: str, beta: float) -> None:
    options = {"loss_type": loss_type, "beta": beta, **HIGH.get(loss_type, {})}
    ours, theirs = _both(tiny_model, tmp_path, 320, 2, **options)
    assert_same_run(ours, theirs)
    if loss_type in ("grpo", "dapo"):
        assert ours.history[1]["clip_ratio/region_mean"] > 0


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("beta", 5.0), ("epsilon_low", 1e-3), ("loss_type", "bnpo"), ("top_entropy_quantile", 0.3)],
)
def test_what_changes_on_the_way_counts(
    tiny_model: Path, tmp_path: Path, attribute: str, value: Any
) -> None:
    """Schedules of TRL's users set attributes of the trainer between steps."""

    def scheduled(trainer: type) -> type:
        class Scheduled(trainer):
            def log(self, logs: dict[str, float], *args: Any) -> None:
                super().log(logs, *args)
                setattr(self, attribute, value)

        return Scheduled

    ours, theirs = (
        train(scheduled(trainer), tiny_model, tmp_path, rollout_func=rollouts(320, 2), beta=0.1)
        for trainer in (FastGRPOTrainer, GRPOTrainer)
    )
    assert_same_run(ours, theirs)


def test_two_trainers_of_one_model_are_told_apart(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    second = []

    def generate(prompts: list, trainer: Any) -> dict[str, Any]:
        if not second:
            second.append(FusedHead(model, temperature=1.0, in_float32=False))
        return rollouts(320, 2)(prompts, trainer)

    with pytest.raises(UserError, match="belongs to another FastGRPOTrainer"):
        train(FastGRPOTrainer, model, tmp_path, rollout_func=generate)


@pytest.mark.parametrize("wrong", [{"vocab_tol": 2.0}, {"impl": "fast"}])
def test_options_are_checked_at_construction(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        FastGRPOTrainer(**wrong)


def test_overrides_that_would_be_ignored_are_refused() -> None:
    class Mine(FastGRPOTrainer):
        @staticmethod
        def get_off_policy_mask(**_: Any) -> float:
            return 1.0

    with pytest.raises(UserError, match="Mine.get_off_policy_mask would have no effect"):
        Mine()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option(tiny_model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    ours, theirs = _both(tiny_model, tmp_path, 320, 2, **options)
    assert_same_run(ours, theirs)
