"""What the policy losses hand back."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PolicyLossOutput:
    """What a policy loss returns."""

    loss: torch.Tensor
    """0-d, differentiable"""
    logprobs: torch.Tensor
    """(N,) log-probs of the targets at the spec's temperature, detached"""
    entropy: torch.Tensor | None
    """(N,) entropies at the spec's temperature, detached"""
    metrics: dict[str, torch.Tensor]
    """0-d tensors on the device; nothing here waits for a GPU"""
