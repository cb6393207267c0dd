"""Log-probs and entropies of logits in plain PyTorch: the specification."""

from __future__ import annotations

import torch

from polymath_fast.kernels.autograd import gradients_of, in_fresh_thread
from polymath_fast.kernels.checks import working_dtype


def token_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`logits` (N, V), `targets` (N,) int64 -> logprobs (N,), entropy (N,), by autograd."""
    scaled = logits.to(working_dtype(logits.dtype)) / temperature
    # A row with NaN or +inf, or with nothing but -inf, is no distribution. Zeros in its place keep
    # its NaN out of the weight gradient, which is a sum over rows.
    peak = scaled.detach().amax(-1, keepdim=True)
    scaled = torch.where(peak.isfinite(), scaled, 0)
    log_p = scaled.log_softmax(-1)
    logprobs = log_p.gather(-1, targets[:, None])[:, 0].clamp(max=0)
    # An excluded token has p = 0 and log p = -inf: it adds nothing, and its gradient is 0 too.
    surprise = torch.where(log_p.isneginf(), 0, log_p)
    entropy = -(log_p.exp() * surprise).sum(-1)
    sound = peak[:, 0].isfinite()
    return torch.where(sound, logprobs, torch.nan), torch.where(sound, entropy, torch.nan)


def gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    by_logprob: torch.Tensor,
    by_entropy: torch.Tensor | None,
) -> torch.Tensor:
    """(N, V) gradient by `logits` of a loss with these derivatives (N,) by their log-probs."""

    def rows(leaf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return token_logprobs(leaf, targets, temperature)

    given = (rows, (logits,), (True,), (by_logprob, by_entropy))
    return in_fresh_thread(lambda: gradients_of(*given), logits.device)[0]
