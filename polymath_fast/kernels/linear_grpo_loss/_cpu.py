"""Policy loss from the LM head on a CPU: the gradient is computed in the forward pass.

Three matrix products for losses whose coefficients are local to a token; a fourth, to compute the
logits again, where a coefficient depends on its whole completion. Where a sampler kept its
distributions, two will do: see `recorded`.
"""

from __future__ import annotations

from typing import Any

import torch

from polymath_fast.kernels.autograd import detached, first_order, wanted
from polymath_fast.kernels.cpu.head import Head
from polymath_fast.kernels.cpu.head_gradient import (
    NO_GRADIENTS,
    Gradients,
    HeadGradient,
    head_gradients,
)
from polymath_fast.kernels.cpu.sink import Sink, add_scaled, sink_of
from polymath_fast.kernels.policy_loss import (
    PolicyBatch,
    PolicyLossOutput,
    PolicyLossSpec,
    PolicyTerms,
    policy_terms,
    summarize,
)
from polymath_fast.kernels.policy_loss.packed import steady_sum

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""hidden, weight and bias, as autograd knows them"""


def linear_grpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    batch: PolicyBatch,
    spec: PolicyLossSpec,
    vocab_tol: float | str,
) -> PolicyLossOutput:
    """`hidden` (N, H), `weight` (V, H), `targets` (N,) int64."""
    inputs = (hidden, weight, bias)
    given, needs = (*detached(inputs), targets, spec.temperature), wanted(inputs)
    how = (needs, vocab_tol, sink_of(weight) is not None)
    head = Head(*given)
    gradient = HeadGradient(head, *how) if any(needs) and spec.scope == "token" else None
    for start, stop in head.blocks():
        if gradient is not None:
            found = head.logprobs[start:stop], head.entropy[start:stop]
            some = policy_terms(batch.rows(start, stop), *found, spec)
            gradient.add(start, some.coefficient, some.entropy_coefficient)
    terms = policy_terms(batch, head.logprobs, head.entropy, spec)
    if gradient is not None:
        return output(head, batch, terms, inputs, gradient.finish())
    if any(needs):
        slopes = (terms.coefficient, terms.entropy_coefficient)
        return output(head, batch, terms, inputs, head_gradients(*given, *slopes, *how))
    return output(head, batch, terms, inputs, NO_GRADIENTS)


def output(
    head: Head,
    batch: PolicyBatch,
    terms: PolicyTerms,
    inputs: Inputs,
    gradients: Gradients,
) -> PolicyLossOutput:
    """The loss, differentiable by those `inputs` whose `gradients` are there."""
    sink = sink_of(inputs[1])
    loss = _WithGradients.apply(steady_sum(terms.loss), sink, *inputs, *gradients[:3])
    metrics = summarize(batch, terms, head.logprobs, head.entropy) | gradients.metrics
    return PolicyLossOutput(loss, head.logprobs, head.entropy, metrics)


class _WithGradients(torch.autograd.Function):
    """A scalar whose gradients by hidden, weight and bias are already there."""

    @staticmethod
    def forward(ctx: Any, loss, sink: Sink | None, hidden, weight, bias, *gradients):
        ctx.save_for_backward(*gradients)
        ctx.sink = sink
        return loss.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: torch.Tensor):
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        if ctx.sink is not None and d_weight is not None:
            add_scaled(ctx.sink, d_weight, float(upstream))
            d_weight = None
        scaled = (
            None if gradient is None else gradient if upstream == 1 else gradient * upstream
            for gradient in (d_hidden, d_weight, d_bias)
        )
        return None, None, *scaled, None, None, None
