"""OpenRLHF 0.11: its log-probs and entropies on our kernels, from logits or the LM head."""

from __future__ import annotations

import torch

from polymath_fast.integrations import check_labels, require
from polymath_fast.integrations.rebinding import Patch, check_replaceable, ours
from polymath_fast.kernels import linear_logprobs, token_logprobs

__all__ = [
    "compute_entropy",
    "linear_log_probs",
    "log_probs_from_logits",
    "patch_openrlhf",
]


def log_probs_from_logits(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """`openrlhf.models.utils.log_probs_from_logits`; `logits` keep their values.

    Args:
        logits: (..., V) bf16, fp16 or fp32, differentiable; labels: (...) int64 in [0, V).

    Returns:
        (...) fp32 (fp64 for fp64 logits), differentiable.

    Raises:
        ValueError: shapes that differ, labels out of range, temperature <= 0.
    """
    return _rows(logits, labels, temperature)[0]


def compute_entropy(logits: torch.Tensor) -> torch.Tensor:
    """`openrlhf.models.utils.compute_entropy`: (..., V) -> (...), differentiable."""
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return _rows(logits, labels, 1.0)[1]


def linear_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both of the above from the LM head, without ever holding logits.

    The entropy is that of the distribution at `temperature`; OpenRLHF's own is at 1.

    Args:
        hidden: (..., H) last hidden states, differentiable; weight: (V, H); bias: (V,).
        labels: (...) int64 in [0, V): the token that each state predicts.

    Returns:
        log-probs (...) and entropies (...), fp32, differentiable.

    Raises:
        ValueError: shapes, dtypes or devices that differ, labels out of range.
    """
    check_labels(labels, hidden, "hidden")
    rows = hidden.reshape(-1, hidden.shape[-1])
    found = linear_logprobs(rows, weight, labels.reshape(-1), bias=bias, temperature=temperature)
    return found[0].view(labels.shape), found[1].view(labels.shape)


def patch_openrlhf() -> Patch:
    """Put the functions above in the place of OpenRLHF's, wherever it has imported them.

    Returns:
        A handle: `handle.undo()`, or `with patch_openrlhf(): ...`.

    Raises:
        ImportError: no OpenRLHF, or another version than 0.11.
        UserError: patched already, or an OpenRLHF whose functions take other arguments.
    """
    require(
        "openrlhf", tested="0.11.0", accepted=("0.11.",), install="pip install openrlhf==0.11.0"
    )
    import openrlhf.models.utils as utils

    parameters = ["logits", "labels", "temperature"]
    theirs = check_replaceable(utils, "log_probs_from_logits", parameters)
    entropy = check_replaceable(utils, "compute_entropy", ["logits"])
    return Patch("openrlhf", {theirs: ours(log_probs_from_logits), entropy: ours(compute_entropy)})


def _rows(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    check_labels(labels, logits, "logits")
    rows = logits.reshape(-1, logits.shape[-1])
    found = token_logprobs(rows, labels.reshape(-1), temperature=temperature)
    return found[0].view(labels.shape), found[1].view(labels.shape)
