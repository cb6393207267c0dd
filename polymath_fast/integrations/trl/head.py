"""A causal LM whose forward scores labels with the operators, in the place of TRL's fused head."""

from __future__ import annotations

import functools
import types
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import FusedCausalLMOutput

from polymath_fast.kernels import (
    PolicyLossOutput,
    PolicyLossSpec,
    linear_grpo_loss,
    linear_logprobs,
)


@dataclass
class Objective:
    """A policy loss that is waiting for the hidden states of its N completion tokens."""

    inputs: dict[str, torch.Tensor | None]
    """tensors of `linear_grpo_loss`, packed"""
    spec: PolicyLossSpec
    output: PolicyLossOutput | None = None
    aux_loss: torch.Tensor | None = None


class FusedHead:
    """Replaces `model.forward` where TRL calls it with `fused_lm_head=True`, and only there.

    With an `objective` the forward computes that loss, straight from the hidden states; without,
    log-probs and entropies. Running inside the forward keeps the hooks of DDP and PEFT.

    Args:
        model: a model that TRL's `add_fused_lm_head` was applied to.
        temperature: divides the logits, the model's own logit scale included.
        in_float32: run the LM head in float32, outside autocast.
        vocab_tol, impl: of `linear_grpo_loss`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        temperature: float,
        in_float32: bool,
        vocab_tol: float | Literal["auto"] = 0.0,
        impl: str = "auto",
    ) -> None:
        self.objective: Objective | None = None
        self.temperature, self.in_float32 = temperature, in_float32
        self.vocab_tol, self.impl = vocab_tol, impl
        others = model.forward

        @functools.wraps(type(model).forward)  # generate checks its arguments against it
        def forward(
            module: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any
        ):
            if not fused_lm_head:
                return others(*args, **kwargs)
            return self._score(module, *args, **kwargs)

        model.forward = types.MethodType(forward, model)

    def _score(
        self, module: PreTrainedModel, *args: Any, labels: torch.Tensor, **kwargs: Any
    ) -> FusedCausalLMOutput:
        """`labels` (B, S), -100 where nothing is predicted; TRL's output, (B, S - 1) a field."""
        config = module.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        states = module.base_model(*args, use_cache=False, **kwargs)
        head = module.get_output_embeddings()
        labels = labels[:, 1:].to(head.weight.device)
        mask = labels != -100
        hidden = states.last_hidden_state[:, :-1].to(head.weight.device)[mask]
        logprobs, entropy, loss = self._head(hidden, head, labels[mask])
        aux_loss = None
        if kwargs.get("output_router_logits"):
            aux_loss = load_balancing_loss_func(
                states.router_logits,
                config.num_experts,
                config.num_experts_per_tok,
                kwargs.get("attention_mask"),
            )
            if self.objective is not None:
                self.objective.aux_loss = aux_loss
        return FusedCausalLMOutput(
            loss=loss,
            log_probs=logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs),
            entropy=entropy.new_zeros(mask.shape).masked_scatter(mask, entropy),
            label_mask=mask,
            aux_loss=aux_loss,
        )

    def _head(
        self, hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(N, H) hidden, (N,) targets -> (N,) log-probs, (N,) entropies, the objective's loss."""
        precision = nullcontext()
        if self.in_float32:
            hidden, precision = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
        weight, bias = head.weight.to(hidden.dtype), getattr(head, "bias", None)
        bias = None if bias is None else bias.to(hidden.dtype)
        with precision:
            if self.objective is None:
                logprobs, entropy = linear_logprobs(
                    hidden, weight, targets, bias=bias, temperature=self.temperature, impl=self.impl
                )
                return logprobs, entropy, None
            inputs = {
                name: None if value is None else value.to(hidden.device)
                for name, value in self.objective.inputs.items()
            }
            self.objective.output = out = linear_grpo_loss(
                hidden,
                weight,
                targets,
                **inputs,
                bias=bias,
                spec=self.objective.spec,
                vocab_tol=self.vocab_tol,
                impl=self.impl,
            )
        return out.logprobs, out.entropy, out.loss
