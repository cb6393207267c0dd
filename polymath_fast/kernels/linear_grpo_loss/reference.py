"""Policy loss from the LM head in plain PyTorch: the specification."""

from __future__ import annotations

from dataclasses import replace

import torch

from polymath_fast.kernels import dispatch
from polymath_fast.kernels.linear_logprobs.reference import linear_logprobs
from polymath_fast.kernels.policy_loss import (
    PolicyBatch,
    PolicyLossOutput,
    PolicyLossSpec,
    differentiable_loss,
)


def linear_grpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    batch: PolicyBatch,
    spec: PolicyLossSpec,
    vocab_tol: float | str,
) -> PolicyLossOutput:
    """`hidden` (N, H), `weight` (V, H), `targets` (N,) int64; exact, `vocab_tol` or not."""
    logprobs, entropy = linear_logprobs(hidden, weight, targets, bias, spec.temperature)
    out = differentiable_loss(batch, logprobs, entropy, spec)
    if not (vocab_tol and dispatch.wants_gradient(hidden, weight, bias)):
        return out
    nothing = torch.zeros((), device=hidden.device, dtype=torch.float32)
    kept = {"vocab/live_share": torch.ones_like(nothing)}
    kept |= {"vocab/dropped_mass": nothing, "vocab/error_bound": nothing.clone()}
    return replace(out, metrics=out.metrics | kept)
