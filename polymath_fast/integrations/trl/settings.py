"""From GRPOConfig and model to `PolicyLossSpec`; what has no counterpart is refused here."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from polymath_fast.errors import UserError
from polymath_fast.kernels import PolicyLossSpec

if TYPE_CHECKING:
    from trl import GRPOConfig, GRPOTrainer

_HELD_BY_TRAINER = {
    "loss_type": "loss_type",
    "epsilon": "epsilon_low",
    "epsilon_high": "epsilon_high",
    "beta": "beta",
    "importance_sampling_level": "importance_sampling_level",
    "off_policy_mask_threshold": "off_policy_mask_threshold",
    "top_entropy_quantile": "top_entropy_quantile",
    "max_completion_length": "max_completion_length",
}
_BY_TOKENS_OF_THE_STEP = ("dapo", "cispo", "vespo")
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")


def policy_spec(args: GRPOConfig | SimpleNamespace, temperature: float) -> PolicyLossSpec:
    """The policy loss that `args` describe; normalisers come with each batch.

    Raises:
        UserError: an option that the loss does not read, or a value outside its range.
    """
    bounds = {"epsilon": args.epsilon, "epsilon_high": args.epsilon_high}
    if args.loss_type == "cispo" and args.epsilon_high is None:
        bounds = {"epsilon_high": args.epsilon}  # TRL's rule: one number serves for both
    try:
        return PolicyLossSpec(
            loss_type=args.loss_type,
            temperature=temperature,
            **bounds,
            delta=args.delta,
            importance_sampling_level=args.importance_sampling_level,
            log_ratio_clamp=None,
            sapo_temperature_pos=args.sapo_temperature_pos,
            sapo_temperature_neg=args.sapo_temperature_neg,
            vespo_k_pos=args.vespo_k_pos,
            vespo_lambda_pos=max(args.vespo_lambda_pos, 1e-4),
            vespo_k_neg=args.vespo_k_neg,
            vespo_lambda_neg=max(args.vespo_lambda_neg, 1e-4),
            off_policy_mask_threshold=args.off_policy_mask_threshold,
            top_entropy_quantile=args.top_entropy_quantile,
            beta=args.beta,
            use_bias_correction_kl=bool(args.beta) and args.use_bias_correction_kl,
            entropy_coef=args.entropy_coef,
            max_completion_length=args.max_completion_length,
        )
    except ValueError as error:
        raise UserError(f"FastGRPOTrainer: {error}") from None


def held_options(trainer: GRPOTrainer) -> dict[str, Any]:
    """Options that TRL reads from the trainer, not from its `args`: callbacks may change them."""
    return {name: getattr(trainer, attribute) for name, attribute in _HELD_BY_TRAINER.items()}


def batch_spec(
    spec: PolicyLossSpec,
    trainer: GRPOTrainer,
    completions: int,
    tokens: int,
    tokens_of_generation: torch.Tensor,
) -> PolicyLossSpec:
    """`spec` with the divisors that TRL gives a micro-batch.

    Args:
        completions, tokens: of the micro-batch; tokens are the trained ones.
        tokens_of_generation: 0-d, trained tokens of the generation batch in all processes.
    """
    training = trainer.model.training
    accumulation = trainer.current_gradient_accumulation_steps if training else 1
    if spec.loss_type in _BY_TOKENS_OF_THE_STEP:
        divisor = max(float(tokens_of_generation), 1.0) / trainer.accelerator.num_processes
        divisor *= accumulation / trainer.args.steps_per_generation if training else 1
    elif spec.loss_type == "bnpo":
        divisor = max(tokens, 1) * accumulation
    else:
        divisor = max(completions, 1) * accumulation
    coefficient = trainer.entropy_coef
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        coefficient = 0.0
    return replace(
        spec,
        normalizer=float(divisor),
        entropy_coef=coefficient,
        entropy_normalizer=float(max(tokens, 1) * accumulation),
    )


def logit_scale(model: PreTrainedModel) -> float:
    """What the model multiplies its logits with (Cohere, Granite, Falcon-H1, ...)."""
    config = model.config.get_text_config()
    for name in _SCALES:
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1 / float(scaling)


def check_supported(trainer: GRPOTrainer, model: PreTrainedModel) -> None:
    """Refuse what the operators, or this adapter, cannot do.

    Raises:
        UserError: naming the setting and what works.
    """
    args, config = trainer.args, model.config.get_text_config()
    head = model.get_output_embeddings()
    softcap = getattr(config, "final_logit_softcapping", None)
    processes = trainer.accelerator.num_processes
    refusals = {
        "a processor: image-text models are not supported; train a text model": trainer._is_vlm,
        f"final_logit_softcapping={softcap} ({config.model_type}): the LM head operator has no "
        "softcap; use trl.GRPOTrainer": softcap is not None,
        f"logit scale {logit_scale(model)}: must be above 0": logit_scale(model) <= 0,
        "an LM head without floating-point weights: load it in bfloat16": (
            head is None or not head.weight.is_floating_point()
        ),
        "fp16: gradients come before the loss scaler and would underflow; use bf16=True": (
            # `accelerate launch --mixed_precision fp16` leaves args.fp16 as it is
            args.fp16 or trainer.accelerator.mixed_precision == "fp16"
        ),
        "torch_compile=True: the fused head is not traced; set torch_compile=False": (
            args.torch_compile
        ),
        "FSDP: the LM head is sharded; use one GPU, or trl.GRPOTrainer": (trainer.is_fsdp_enabled),
        "DeepSpeed: the LM head may be sharded; use trl.GRPOTrainer": trainer.is_deepspeed_enabled,
        f"top_entropy_quantile={args.top_entropy_quantile} in {processes} processes: the quantile "
        "is taken per process; set it to 1.0": args.top_entropy_quantile < 1 and processes > 1,
    }
    for reason, applies in refusals.items():
        if applies:
            raise UserError(f"FastGRPOTrainer does not support {reason}")
