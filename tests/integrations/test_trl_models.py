"""FastGRPOTrainer on other models: the embedded one, adapters, experts, scaled and biased heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import transformers  # noqa: E402
from closeness import relative_error  # noqa: E402
from datasets import Dataset  # noqa: E402
from trl import GRPOTrainer  # noqa: E402
from trl_runs import assert_same_run, rollouts, train  # noqa: E402

from polymath_fast.errors import UserError  # noqa: E402
from polymath_fast.integrations.trl import FastGRPOTrainer  # noqa: E402
from polymath_fast.integrations.trl.settings import check_supported  # noqa: E402

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}


def _fresh(kind: str, **more: Any) -> Callable[[], torch.nn.Module]:
    """Maker of one random model of an architecture of transformers."""

    def make() -> torch.nn.Module:
        torch.manual_seed(7)
        config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        head = model.get_output_embeddings()
        if head.bias is not None:
            torch.nn.init.normal_(head.bias)
        return model

    return make


def _compare(model: Any, folder: Path, tolerance: float = 2e-5, vocab: int = 320, **options: Any):
    runs = [
        train(
            trainer,
            model() if callable(model) else model,
            folder,
            rollout_func=rollouts(vocab, 2),
            **options,
        )
        for trainer in (FastGRPOTrainer, GRPOTrainer)
    ]
    assert_same_run(*runs, tolerance)
    return runs


@pytest.mark.parametrize(
    ("loss_type", "beta"), [("dapo", 0.0), *((loss_type, 0.1) for loss_type in LOSS_TYPES)]
)
def test_embedded_model(smollm2: Path, tmp_path: Path, loss_type: str, beta: float) -> None:
    """Its vocabulary, tokenizer, tied head and first layer: the others are not ours."""
    _compare(
        smollm2,
        tmp_path,
        tolerance=1e-4,
        vocab=49152,
        loss_type=loss_type,
        beta=beta,
        learning_rate=3e-5,
        gradient_accumulation_steps=1,
        model_init_kwargs={"dtype": "float32", "num_hidden_layers": 1},
        **({"epsilon_high": 1.05} if loss_type == "cispo" else {}),
    )


def test_embedded_model_in_full_with_its_own_samples(smollm2: Path, tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 1, "max_completion_length": 6}
    runs = [
        train(trainer, smollm2, tmp_path, **options) for trainer in (FastGRPOTrainer, GRPOTrainer)
    ]
    assert_same_run(*runs, tolerance=1e-4)


def test_low_rank_adapters(tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    adapters = {"peft_config": LoraConfig(r=4, lora_dropout=0.0, init_lora_weights="gaussian")}
    ours, _ = _compare(tiny_model, tmp_path, beta=0.1, trainer_options=adapters, learning_rate=0.1)
    assert all("lora" in name for name in ours.gradients[0])
    assert ours.history[1]["kl"] > 0


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (_fresh("Mixtral", num_local_experts=4, num_experts_per_tok=2), {}),
        (_fresh("Granite", logits_scaling=4.0), {"temperature": 0.8}),
        (_fresh("Phi"), {"entropy_coef": 0.1}),
    ],
    ids=["experts", "scaled logits", "biased head"],
)
def test_architectures(
    tiny_model: Path, tmp_path: Path, model: Any, options: dict[str, Any]
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model, padding_side="left")
    if "Mixtral" in str(type(model())):
        options = {"router_aux_loss_coef": 0.1}
    ours, _ = _compare(model, tmp_path, trainer_options={"processing_class": tokenizer}, **options)
    assert ("aux_loss" in ours.history[0]) == ("router_aux_loss_coef" in options)


def test_mixed_precision_is_no_further_from_float32_than_trl(
    tiny_model: Path, tmp_path: Path
) -> None:
    options = {"num_iterations": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-6}

    def gradients(trainer: type, bf16: bool) -> torch.Tensor:
        generate = rollouts(320, 2)
        run = train(trainer, tiny_model, tmp_path, rollout_func=generate, bf16=bf16, **options)
        return torch.cat([gradient.flatten() for gradient in run.gradients[0].values()])

    exact = gradients(GRPOTrainer, bf16=False)
    ours = relative_error(gradients(FastGRPOTrainer, bf16=True), exact)
    theirs = relative_error(gradients(GRPOTrainer, bf16=True), exact)
    assert 1e-4 < ours <= 1.1 * theirs < 0.1


def test_evaluation(tiny_model: Path, tmp_path: Path) -> None:
    held_out = Dataset.from_dict({"prompt": ["three", "four"]})
    ours, _ = _compare(
        tiny_model,
        tmp_path,
        trainer_options={"eval_dataset": held_out},
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        beta=0.1,
    )
    assert any("eval_loss" in row for row in ours.history)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
def test_nothing_trained_gives_zero_gradients(
    tiny_model: Path, tmp_path: Path, loss_type: str
) -> None:
    run = train(
        FastGRPOTrainer,
        tiny_model,
        tmp_path,
        rollout_func=rollouts(320, eos=9),  # never a real end: every completion counts as cut
        mask_truncated_completions=True,
        loss_type=loss_type,
    )
    assert run.history[0]["loss"] == 0
    assert run.gradients[0]
    assert all(gradient.abs().max() == 0 for gradient in run.gradients[0].values())


def test_advantages_of_tokens(tiny_model: Path, tmp_path: Path) -> None:
    """Subclasses of GRPOTrainer may give (B, T) advantages."""

    def by_token(trainer: type) -> type:
        class ByToken(trainer):
            def _generate_and_score_completions(self, inputs):
                output = super()._generate_and_score_completions(inputs)
                steps = torch.arange(output["completion_ids"].shape[1])
                output["advantages"] = output["advantages"][:, None] * (1 + steps)
                return output

        return ByToken

    runs = [
        train(by_token(trainer), tiny_model, tmp_path, rollout_func=rollouts(320, 2))
        for trainer in (FastGRPOTrainer, GRPOTrainer)
    ]
    assert_same_run(*runs)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"args.fp16": True}, "fp16"),
        ({"accelerator.mixed_precision": "fp16"}, "fp16"),
        ({"args.torch_compile": True}, "torch_compile"),
        ({"is_fsdp_enabled": True}, "FSDP"),
        ({"is_deepspeed_enabled": True}, "DeepSpeed"),
        ({"_is_vlm": True}, "processor"),
        (
            {"args.top_entropy_quantile": 0.5, "accelerator.num_processes": 2},
            "top_entropy_quantile=0.5 in 2 processes",
        ),
        ({"config.final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"config.logit_scale": 0.0}, "logit scale 0.0"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], named: str) -> None:
    model = _fresh("Llama")()
    trainer = SimpleNamespace(
        args=SimpleNamespace(fp16=False, torch_compile=False, top_entropy_quantile=1.0),
        accelerator=SimpleNamespace(num_processes=1, mixed_precision="no"),
        config=model.config,
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
        _is_vlm=False,
    )
    check_supported(trainer, model)
    for path, value in changes.items():
        *owner, name = path.split(".")
        setattr(getattr(trainer, owner[0]) if owner else trainer, name, value)
    with pytest.raises(UserError, match="FastGRPOTrainer does not support") as refusal:
        check_supported(trainer, model)
    assert named in str(refusal.value)
