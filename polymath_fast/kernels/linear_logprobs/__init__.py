"""Log-probs of the sampled tokens and entropies, straight from the LM head."""

from __future__ import annotations

import torch

from polymath_fast.kernels import checks, compiled, dispatch

__all__ = ["linear_logprobs"]


@dispatch.untraced(within=compiled.linear_logprobs)
def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs(hidden @ weight.T + bias, targets)` without ever holding (N, V) logits.

    Args:
        hidden: (N, H) state that predicts each target, differentiable.
        weight: (V, H) of the LM head, differentiable.
        targets: (N,) int64 in [0, V).
        bias: (V,), differentiable; -inf excludes a token.
        temperature: divides the logits.
        impl: "auto", "reference", "cpu" or "triton".

    Returns:
        logprobs (N,), never above 0, and entropy (N,), both fp32 (fp64 for fp64 inputs) and
        differentiable. Products are accumulated in fp32, never rounded to the input dtype.

    Raises:
        ValueError: wrong shapes, mixed dtypes or devices, targets out of range, temperature <= 0.
    """
    checks.check_temperature(temperature)
    hidden, weight, bias = checks.under_autocast(hidden, weight, bias)
    checks.check_head(hidden, weight, targets, bias)
    implementation = dispatch.resolve("linear_logprobs", hidden, impl)
    return implementation.linear_logprobs(hidden, weight, targets.long(), bias, temperature)
