"""Policy loss from logits in plain PyTorch: the specification."""

from __future__ import annotations

import torch

from polymath_fast.kernels.policy_loss import (
    PolicyBatch,
    PolicyLossOutput,
    PolicyLossSpec,
    differentiable_loss,
)
from polymath_fast.kernels.token_logprobs.reference import token_logprobs


def grpo_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    batch: PolicyBatch,
    spec: PolicyLossSpec,
    inplace: bool,
) -> PolicyLossOutput:
    """`logits` (N, V), `targets` (N,) int64; the leave to destroy the logits is not made use of."""
    logprobs, entropy = token_logprobs(logits, targets, spec.temperature)
    return differentiable_loss(batch, logprobs, entropy, spec)
