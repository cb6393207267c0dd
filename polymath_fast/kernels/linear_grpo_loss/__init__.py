"""Policy loss straight from the LM head."""

from __future__ import annotations

from typing import Literal

import torch

from polymath_fast.kernels import checks, dispatch
from polymath_fast.kernels.linear_grpo_loss import compiled
from polymath_fast.kernels.policy_loss import PolicyLossOutput, PolicyLossSpec, prepare
from polymath_fast.kernels.policy_loss.input_checks import given_spec

__all__ = ["linear_grpo_loss"]


@dispatch.untraced(within=compiled.linear_grpo_loss)
def linear_grpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    sampling_logprobs: torch.Tensor | None = None,
    importance_weights: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    multiplicity: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    spec: PolicyLossSpec | None = None,
    vocab_tol: float | Literal["auto"] = 0.0,
    impl: str = "auto",
) -> PolicyLossOutput:
    """`grpo_loss(hidden @ weight.T + bias, ...)` without ever holding (N, V) logits.

    Args:
        hidden: (N, H), row i predicts `targets[i]`; differentiable.
        weight: (V, H) of the LM head; differentiable.
        targets: (N,) int64 in [0, V), also where `mask` is False.
        advantages: (B,) one a completion, or (N,) one a token; detached.
        cu_seqlens: (B + 1,) int32, completion b is rows cu_seqlens[b] to cu_seqlens[b + 1].
        old_logprobs: (N,) of the policy that sampled or was last improved; None = on-policy.
        ref_logprobs: (N,) of the reference policy; needed when `spec.beta` is not 0.
        sampling_logprobs: (N,) as the rollout engine reported them; for the spec's corrections and
            two metrics.
        importance_weights: (B,) or (N,) multiply the policy term; detached.
        mask: (N,) bool, True on trained tokens; None = all.
        multiplicity: (B,) float, how often a completion counts in loss and metrics, as if it were
            there so many times; None = once. Where losses are summed up by completion, the spec
            must hold `normalizer`.
        bias: (V,); differentiable.
        spec: options of the loss; None = `PolicyLossSpec()`. Its docstring says how to split a step
            over several calls.
        vocab_tol: leave to drop vocabulary columns from both gradients. 0: exact. A number: columns
            in which no |d loss / d logit| reaches that share of the largest coefficient of a chunk
            of rows. "auto": as many as keep the relative error of both gradients (Frobenius norm,
            per chunk) below that of rounding them to bf16, 2.6e-3, by a bound that is checked; none
            where too many matter. Log-probs, loss and the gradient of `bias` stay exact. With it,
            metrics hold "vocab/live_share", "vocab/dropped_mass" and "vocab/error_bound".
        impl: "auto", "reference", "cpu" or "triton".

    Returns:
        `PolicyLossOutput`. N = 0 gives loss 0. A trained row without a finite log-prob (NaN or
        +inf in its logits, or a target that is excluded) makes the loss NaN, is counted in
        metrics["nonfinite_rows"] and contributes no gradient; other rows keep theirs.

    Raises:
        ValueError: wrong shapes, mixed dtypes or devices, targets out of range, a missing input.
    """
    spec = given_spec(spec)
    hidden, weight, bias = checks.under_autocast(hidden, weight, bias)
    checks.check_head(hidden, weight, targets, bias, checks.MASKED)
    batch = prepare(
        spec,
        hidden.shape[0],
        checks.working_dtype(hidden.dtype),
        hidden.device,
        advantages,
        cu_seqlens,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampling_logprobs=sampling_logprobs,
        importance_weights=importance_weights,
        mask=mask,
        multiplicity=multiplicity,
    )
    checks.check_vocab_tol(vocab_tol)
    implementation = dispatch.resolve("linear_grpo_loss", hidden, impl)
    return implementation.linear_grpo_loss(
        hidden, weight, targets.long(), bias, batch, spec, vocab_tol
    )
