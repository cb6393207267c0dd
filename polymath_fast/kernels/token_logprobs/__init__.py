"""Log-probs of the sampled tokens and entropies, from logits."""

from __future__ import annotations

import torch

from polymath_fast.kernels import checks, compiled, dispatch

__all__ = ["token_logprobs"]


@dispatch.untraced(within=compiled.token_logprobs)
def token_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits / temperature)[targets] and the entropy of softmax(logits / temperature).

    Args:
        logits: (N, V), any strides, differentiable. -inf excludes a token; a row with NaN or +inf
            yields NaN for itself only.
        targets: (N,) int64 in [0, V).
        temperature: divides the logits.
        impl: "auto", "reference", "cpu" or "triton".

    Returns:
        logprobs (N,), never above 0, and entropy (N,), both fp32 (fp64 for fp64 logits) and
        differentiable.

    Raises:
        ValueError: wrong shapes, dtypes, devices, targets out of range, temperature <= 0.
    """
    checks.check_temperature(temperature)
    checks.check_logits(logits, targets)
    implementation = dispatch.resolve("token_logprobs", logits, impl)
    return implementation.token_logprobs(logits, targets.long(), temperature)
