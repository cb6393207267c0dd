"""The policy loss from logits inside graphs of torch.compile: two operators, one after the other.

The plain call on a GPU can write an on-policy gradient while it still holds the row. Here the
gradient comes in the backward pass, from logits that are left alone: `inplace` is not made use of.
"""

from __future__ import annotations

from torch import Tensor

from polymath_fast.kernels.compiled import token_logprobs
from polymath_fast.kernels.policy_loss import PolicyLossOutput, PolicyLossSpec
from polymath_fast.kernels.policy_loss.compiled import policy_loss
from polymath_fast.kernels.policy_loss.input_checks import given_spec


def grpo_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    mask: Tensor | None = None,
    spec: PolicyLossSpec | None = None,
    inplace: bool = False,
    impl: str = "auto",
) -> PolicyLossOutput:
    """As `kernels.grpo_loss`."""
    spec = given_spec(spec)
    logprobs, entropy = token_logprobs(logits, targets, temperature=spec.temperature, impl=impl)
    return policy_loss(
        logprobs,
        advantages,
        cu_seqlens,
        entropy=entropy,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampling_logprobs=sampling_logprobs,
        importance_weights=importance_weights,
        mask=mask,
        spec=spec,
    )
