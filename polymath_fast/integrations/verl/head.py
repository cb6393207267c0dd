"""verl's two fused LM heads, on `linear_logprobs`."""

from __future__ import annotations

from typing import Any

import torch

from polymath_fast.integrations import check_labels
from polymath_fast.kernels import linear_logprobs


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`verl.utils.kernel.linear_cross_entropy.linear_cross_entropy`.

    Args:
        hidden: (N, H) or (..., H); weight: (V, H); labels: (N,) or (...).
        reduction: of the log-probs: "none", "sum" or "mean".

    Returns:
        log-probs (N,), or 0-d, and entropies (N,), fp32 and differentiable.

    Raises:
        ValueError: a vocabulary that is split over processes; another reduction; labels that are
            not one a state.
    """
    if dist_process_group is not None:
        raise ValueError(
            "dist_process_group: a vocabulary split over processes is not supported; set "
            "tensor_model_parallel_size=1 for training, or do not call patch_verl()"
        )
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction={reduction!r}: must be 'none', 'sum' or 'mean'")
    if labels.ndim > 1:
        check_labels(labels, hidden, "hidden")
    logprobs, entropy = linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature=temperature
    )
    if reduction != "none":
        logprobs = logprobs.sum() if reduction == "sum" else logprobs.mean()
    return logprobs, entropy


class FusedLinearForPPO(torch.nn.Module):
    """`verl.utils.experimental.torch_functional.FusedLinearForPPO`; it needs neither chunk size nor
    backend, which verl hands over from 0.9.1 on."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()

    def forward(
        self,
        hidden_states: torch.Tensor,
        vocab_weights: torch.Tensor,
        input_ids: torch.Tensor,
        temperature: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., H), (V, H), (...) -> log-probs and entropies (...), fp32."""
        found = linear_cross_entropy(hidden_states, vocab_weights, input_ids, temperature)
        return found[0].view(input_ids.shape), found[1].view(input_ids.shape)
