"""Policy loss from the LM head on a CPU: the gradient is computed in the forward pass.

Three matrix products for losses whose coefficients are local to a token; a fourth, to compute the
logits again, where a coefficient depends on its whole completion.
"""

from __future__ import annotations

from typing import Any

import torch

from polymath_fast.kernels.autograd import first_order
from polymath_fast.kernels.cpu.head import Head
from polymath_fast.kernels.cpu.head_gradient import HeadGradient, head_gradients
from polymath_fast.kernels.cpu.recorded_head import RecordedHead, RecordedPredictions
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


def linear_grpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    batch: PolicyBatch,
    spec: PolicyLossSpec,
    vocab_tol: float | str,
    recorded: RecordedPredictions | None = None,
    states: torch.Tensor | None = None,
) -> PolicyLossOutput:
    """`hidden` (N, H), `weight` (V, H), `targets` (N,) int64; `recorded`, `states`: see
    `recorded`."""
    needs = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, weight, bias)
    )
    inputs = (hidden.detach(), weight.detach(), None if bias is None else bias.detach(), targets)
    known = recorded is not None
    head = RecordedHead(*inputs, recorded, states) if known else Head(*inputs, spec.temperature)
    sink = sink_of(weight)
    how = (needs, vocab_tol, sink is not None)
    everything = (head, batch, spec, 0, len(targets))
    terms = _terms(*everything) if known else None
    largest = head.by_state(terms.coefficient) if known else None
    gradient = HeadGradient(head, *how) if any(needs) and (known or spec.scope == "token") else None
    for start, stop in head.blocks():
        if gradient is not None and known:
            gradient.add(start, largest[start:stop], None)
        elif gradient is not None:
            some = _terms(head, batch.rows(start, stop), spec, start, stop)
            gradient.add(start, some.coefficient, some.entropy_coefficient)
    terms = terms or _terms(*everything)
    gradients, report = (None, None, None), None
    if gradient is not None:
        gradients, report = gradient.finish(), gradient.report
    elif any(needs):
        slopes = (terms.coefficient, terms.entropy_coefficient)
        gradients, report = head_gradients(*inputs, spec.temperature, *slopes, *how)
    loss = _WithGradients.apply(steady_sum(terms.loss), hidden, weight, bias, sink, *gradients)
    metrics = summarize(batch, terms, head.logprobs, head.entropy)
    if vocab_tol and report is not None:
        metrics |= report.metrics()
    return PolicyLossOutput(loss, head.logprobs, head.entropy, metrics)


def _terms(
    head: Head, batch: PolicyBatch, spec: PolicyLossSpec, start: int, stop: int
) -> PolicyTerms:
    return policy_terms(batch, head.logprobs[start:stop], head.entropy[start:stop], spec)


class _WithGradients(torch.autograd.Function):
    """A scalar whose gradients by hidden, weight and bias are already there."""

    @staticmethod
    def forward(ctx: Any, loss, hidden, weight, bias, sink: Sink | None, *gradients):
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
        return None, *scaled, None, None, None, None
