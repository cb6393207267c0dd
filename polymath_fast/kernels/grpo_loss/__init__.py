"""Policy loss from logits."""

from __future__ import annotations

import torch

from polymath_fast.kernels import checks, dispatch
from polymath_fast.kernels.grpo_loss import compiled
from polymath_fast.kernels.policy_loss import PolicyLossOutput, PolicyLossSpec, prepare
from polymath_fast.kernels.policy_loss.input_checks import given_spec

__all__ = ["grpo_loss"]


@dispatch.untraced(within=compiled.grpo_loss)
def grpo_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    sampling_logprobs: torch.Tensor | None = None,
    importance_weights: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    spec: PolicyLossSpec | None = None,
    inplace: bool = False,
    impl: str = "auto",
) -> PolicyLossOutput:
    """Clipped policy loss, KL penalty and entropy bonus of the tokens that `logits` predict.

    Args:
        logits: (N, V), row i predicts `targets[i]`; differentiable.
        targets: (N,) int64 in [0, V), also where `mask` is False.
        advantages: (B,) one a completion, or (N,) one a token; detached.
        cu_seqlens: (B + 1,) int32, completion b is rows cu_seqlens[b] to cu_seqlens[b + 1].
        old_logprobs: (N,) of the policy that sampled or was last improved; None = on-policy.
        ref_logprobs: (N,) of the reference policy; needed when `spec.beta` is not 0.
        sampling_logprobs: (N,) as the rollout engine reported them; for the spec's corrections and
            two metrics.
        importance_weights: (B,) or (N,) multiply the policy term; detached.
        mask: (N,) bool, True on trained tokens; None = all.
        spec: options of the loss; None = `PolicyLossSpec()`. Its docstring says how to split a step
            over several calls.
        inplace: leave to write the gradient over `logits`, which saves their size in memory. They
            are garbage after this call already; autograd refuses to use them again.
        impl: "auto", "reference", "cpu" or "triton".

    Returns:
        `PolicyLossOutput`. N = 0 gives loss 0. A trained row without a finite log-prob (NaN or
        +inf in its logits, or a target that is excluded) makes the loss NaN, is counted in
        metrics["nonfinite_rows"] and contributes no gradient; other rows keep theirs.

    Raises:
        ValueError: wrong shapes, dtypes or devices, targets out of range, a missing input.
    """
    spec = given_spec(spec)
    checks.check_logits(logits, targets, checks.MASKED)
    batch = prepare(
        spec,
        logits.shape[0],
        checks.working_dtype(logits.dtype),
        logits.device,
        advantages,
        cu_seqlens,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampling_logprobs=sampling_logprobs,
        importance_weights=importance_weights,
        mask=mask,
    )
    implementation = dispatch.resolve("grpo_loss", logits, impl)
    return implementation.grpo_loss(logits, targets.long(), batch, spec, inplace)
