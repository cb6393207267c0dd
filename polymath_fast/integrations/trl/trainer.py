"""`FastGRPOTrainer`: TRL's GRPOTrainer with hidden states going straight into the policy loss."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
from trl import GRPOTrainer

from polymath_fast.errors import UserError
from polymath_fast.integrations.trl.head import FusedHead, Objective
from polymath_fast.integrations.trl.settings import (
    batch_spec,
    check_supported,
    held_options,
    logit_scale,
    policy_spec,
)
from polymath_fast.kernels import PolicyLossSpec, dispatch
from polymath_fast.kernels.checks import check_vocab_tol

_IN_THE_KERNELS = ("get_high_entropy_mask", "get_off_policy_mask", "get_gamma_weights")


class FastGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with three matrix products an LM head where TRL does four, and no logits.

    Takes everything that GRPOTrainer takes, computes the same losses, gradients and metrics. Old
    and reference log-probs come from the same kernels, so that a first update has ratio 1 exactly.

    Args:
        vocab_tol: see `linear_grpo_loss`; 0 is exact. With it, "vocab/*" metrics are logged.
        impl: see `linear_grpo_loss`.

    Raises:
        UserError: at construction, a setting or model that the operators do not cover, or a
            subclass with another `get_off_policy_mask` and the like; later, a model that was given
            to another one since.
        ValueError: `vocab_tol` or `impl` that there is not.
    """

    def __init__(
        self,
        *args: Any,
        vocab_tol: float | Literal["auto"] = 0.0,
        impl: str = "auto",
        **kwargs: Any,
    ) -> None:
        check_vocab_tol(vocab_tol)
        dispatch.check_name(impl, "impl")
        for name in _IN_THE_KERNELS:
            if getattr(type(self), name) is not getattr(GRPOTrainer, name):
                raise UserError(
                    f"{type(self).__name__}.{name} would have no effect: FastGRPOTrainer does that "
                    "inside its kernels; derive from trl.GRPOTrainer to replace it"
                )
        super().__init__(*args, **kwargs)
        unwrapped = self.accelerator.unwrap_model(self.model)
        model = getattr(unwrapped, "get_base_model", lambda: unwrapped)()
        check_supported(self, model)
        temperature = self._logit_temperature = self.temperature / logit_scale(model)
        policy_spec(self.args, temperature)
        self._held_at_start = held_options(self)
        options = {"in_float32": self.args.cast_lm_head_to_fp32, "impl": impl}
        self._fused_head = FusedHead(model, temperature=temperature, vocab_tol=vocab_tol, **options)
        if self.ref_model is not None:
            FusedHead(self.ref_model, temperature=temperature, **options)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The policy loss of a micro-batch, 0-d, with its gradient already computed."""
        objective = self._fused_head.objective = self._objective(inputs)
        try:
            # TRL's own code on the log-probs of the objective: its metrics and entropy controller.
            # Those log-probs are detached, so its loss has no gradient and is left aside.
            super()._compute_loss(model, inputs)
        finally:
            self._fused_head.objective = None
        if objective.output is None:
            raise UserError(
                "the model's head belongs to another FastGRPOTrainer, which was made with the same "
                "model after this one: give each of them a model of its own, or use the last one"
            )
        mode = "train" if self.model.training else "eval"
        for name, value in objective.output.metrics.items():
            if name.startswith("vocab/"):
                self._metrics[mode][name].append(self.accelerator.gather(value).mean().item())
        loss = objective.output.loss
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if mode == "train" else 1
            loss = loss + self.router_aux_loss_coef * objective.aux_loss / steps
        return loss

    def _objective(self, inputs: dict[str, Any]) -> Objective:
        """What `linear_grpo_loss` needs of TRL's padded batch: (B, T) tensors packed to (N,)."""
        completion = inputs["completion_mask"].bool()  # (B, T)
        trained = completion & inputs.get("tool_mask", completion).bool()
        spec = batch_spec(
            self._spec_now(),
            self,
            completions=len(completion),
            tokens=int(trained.sum()),
            tokens_of_generation=inputs["num_items_in_batch"],
        )

        def packed(name: str) -> torch.Tensor | None:
            value = inputs.get(name)
            return None if value is None else value[completion]

        # completions without a token are left out, so that a value a token is never taken for one
        # a completion; the spec's divisors count them
        some = completion.any(1)
        advantages = inputs["advantages"]
        old, sampling = packed("old_per_token_logps"), None
        if spec.off_policy_mask_threshold is not None:
            sampling = packed("sampling_per_token_logps")
            if old is None and sampling is None:  # on-policy: no completion has drifted
                spec = replace(spec, off_policy_mask_threshold=None)
        offsets = torch.nn.functional.pad(completion[some].sum(1).cumsum(0), (1, 0))
        return Objective(
            inputs={
                "advantages": advantages[some if advantages.ndim == 1 else completion],
                "cu_seqlens": offsets.int(),
                "old_logprobs": old,
                "ref_logprobs": packed("ref_per_token_logps") if spec.beta else None,
                "sampling_logprobs": sampling,
                "importance_weights": self._importance_weights(inputs, completion, some),
                "mask": trained[completion],
            },
            spec=spec,
        )

    def _spec_now(self) -> PolicyLossSpec:
        """The loss that TRL would compute now, with what callbacks have changed since the start."""
        held, before = held_options(self), self._held_at_start
        changed = {name: value for name, value in held.items() if value != before[name]}
        if "epsilon" in changed:  # TRL lets one bound serve for both at the start only
            changed["epsilon_high"] = held["epsilon_high"]
        return policy_spec(SimpleNamespace(**(vars(self.args) | changed)), self._logit_temperature)

    def _importance_weights(
        self, inputs: dict[str, Any], completion: torch.Tensor, some: torch.Tensor
    ) -> torch.Tensor | None:
        """(B,) or (N,): TRL's correction for having sampled with vLLM."""
        if not (self.use_vllm and self.vllm_importance_sampling_correction):
            return None
        weights = inputs["importance_sampling_ratio"]  # (B, 1) or (B, T)
        by_sequence = self.vllm_importance_sampling_mode.startswith("sequence")
        return weights.squeeze(1)[some] if by_sequence else weights[completion]
