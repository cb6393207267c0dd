"""Policy loss from the LM head where a sampler kept what it drew from: two products, not three."""

from __future__ import annotations

import torch

from polymath_fast.kernels import checks
from polymath_fast.kernels.autograd import detached, wanted
from polymath_fast.kernels.cpu.head_gradient import NO_GRADIENTS, Gradients, HeadGradient
from polymath_fast.kernels.cpu.recorded_head import RecordedHead, RecordedPredictions
from polymath_fast.kernels.cpu.sink import sink_of
from polymath_fast.kernels.linear_grpo_loss._cpu import Inputs, output
from polymath_fast.kernels.policy_loss import (
    PolicyLossOutput,
    PolicyLossSpec,
    PolicyTerms,
    policy_terms,
    prepare,
)


def recorded_grpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    recorded: RecordedPredictions,
    states: torch.Tensor | None = None,
    *,
    spec: PolicyLossSpec,
    bias: torch.Tensor | None = None,
    vocab_tol: float | str = 0.0,
    **of_tokens: torch.Tensor | None,
) -> PolicyLossOutput:
    """`linear_grpo_loss` on a CPU of N targets that were drawn with these very weights.

    Args:
        recorded: what was kept when `targets` were drawn, at the temperature of `spec`.
        states: (N,) int64, the row of `hidden` (S, H) that predicts each target, each row at least
            one; None: `hidden` is (N, H), a row a target.
        of_tokens: old_logprobs, sampling_logprobs and so on, see `linear_grpo_loss`.

    Raises:
        ValueError: as `linear_grpo_loss`; another temperature; an entropy bonus, whose gradient
            needs logits.
    """
    shown = hidden if states is None else hidden[:1].expand(len(targets), -1)
    checks.check_head(shown, weight, targets, bias, checks.MASKED)
    if states is None:
        states = torch.arange(len(targets))
    if recorded.temperature != spec.temperature or len(recorded.rows) != len(targets):
        raise ValueError(
            f"the predictions are of {len(recorded.rows)} tokens at temperature "
            f"{recorded.temperature:g}, the loss of {len(targets)} at {spec.temperature:g}"
        )
    if spec.entropy_coef:
        raise ValueError(f"entropy_coef={spec.entropy_coef:g} needs logits: use linear_grpo_loss")
    checks.check_vocab_tol(vocab_tol)
    rows = (len(targets), checks.working_dtype(hidden.dtype), hidden.device)
    batch = prepare(spec, *rows, advantages, cu_seqlens, **of_tokens)
    inputs = (hidden, weight, bias)
    head = RecordedHead(*detached(inputs), targets, recorded, states)
    terms = policy_terms(batch, head.logprobs, head.entropy, spec)
    return output(head, batch, terms, inputs, _gradients(head, terms, inputs, vocab_tol))


def _gradients(
    head: RecordedHead, terms: PolicyTerms, inputs: Inputs, vocab_tol: float | str
) -> Gradients:
    needs = wanted(inputs)
    if not any(needs):
        return NO_GRADIENTS
    gradient = HeadGradient(head, needs, vocab_tol, sink_of(inputs[1]) is not None)
    largest = head.by_state(terms.coefficient)
    for start, stop in head.blocks():
        gradient.add(start, largest[start:stop], None)
    return gradient.finish()
