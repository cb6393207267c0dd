"""Policy loss from the LM head on a GPU: the gradient is computed in the forward pass.

With N rows, f N of them with a gradient: (1 + 2 f) 2 N H V operations where a token's coefficient
follows from that token, (1 + 3 f) 2 N H V where it needs its completion or the batch: then a first
pass gets all log-probs and a second one the gradient. On-policy coefficients need neither. Memory
moved, in bytes of bf16: a chunk's E written once and read twice, 6 N V, most of it behind the
products; the fp32 weight gradient read and written once a chunk, 8 V H N / C. Held at once: 2 C V
for E, 4 V H for the fp32 weight gradient and 2 V H + 2 N H for the results.
"""

from __future__ import annotations

import torch

from polymath_fast.kernels.autograd import detached, wanted
from polymath_fast.kernels.policy_loss import (
    PolicyBatch,
    PolicyLossOutput,
    PolicyLossSpec,
    PolicyTerms,
    policy_terms,
    summarize,
)
from polymath_fast.kernels.triton.autograd import with_gradients
from polymath_fast.kernels.triton.coefficients import known_beforehand, may_have_gradient
from polymath_fast.kernels.triton.head import Chunk, Head
from polymath_fast.kernels.triton.head_gradient import HeadGradient
from polymath_fast.kernels.triton.live import all_chunks, live_chunks


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
    needs = wanted(inputs)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = Head(*detached(inputs), targets, spec.temperature)
        found = torch.empty(2, len(targets), device=hidden.device, dtype=torch.float32)
        gradients = (None, None, None)
        if any(needs):
            gradient = HeadGradient(head, needs, _unit(batch, spec), vocab_tol)
            _differentiate(head, gradient, batch, spec, found)
            gradients = gradient.finish()
        else:
            _look(head, found)
            head.release()
        logprobs, entropy = found
        terms = policy_terms(batch, logprobs, entropy, spec)
        metrics = summarize(batch, terms, logprobs, entropy)
        if any(needs) and gradient.vocabulary is not None:
            metrics |= gradient.vocabulary.metrics()
        total = terms.loss.sum()
    loss = with_gradients(total, inputs, gradients)
    return PolicyLossOutput(loss, logprobs, entropy, metrics)


def _look(head: Head, found: torch.Tensor) -> None:
    """Log-probs and entropies of all rows into `found` (2, N)."""
    for chunk in all_chunks(head):
        found[:, chunk.index] = chunk.found[:2]


def _differentiate(
    head: Head,
    gradient: HeadGradient,
    batch: PolicyBatch,
    spec: PolicyLossSpec,
    found: torch.Tensor,
) -> None:
    """Fill `found` (2, N) and `gradient`."""
    terms = known_beforehand(batch, spec)
    one_pass = terms is not None or spec.scope == "token"
    if not one_pass:
        _look(head, found)
        terms = policy_terms(batch, *found, spec)
    live = may_have_gradient(batch, spec) if terms is None else _has_gradient(terms)
    for chunk in live_chunks(head, live, others=one_pass):
        if one_pass:
            found[:, chunk.index] = chunk.found[:2]
        gradient.add(chunk, *_slopes(chunk, terms, batch, spec))


def _slopes(
    chunk: Chunk, terms: PolicyTerms | None, batch: PolicyBatch, spec: PolicyLossSpec
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(C,) derivatives of the loss by the chunk's log-probs and entropies."""
    if terms is None:
        here = policy_terms(_take(batch, chunk.index), *chunk.found[:2], spec)
        return here.coefficient, here.entropy_coefficient
    by_entropy = terms.entropy_coefficient
    by_entropy = None if by_entropy is None else by_entropy[chunk.index]
    return terms.coefficient[chunk.index], by_entropy


def _has_gradient(terms: PolicyTerms) -> torch.Tensor:
    live = terms.coefficient != 0
    return live if terms.entropy_coefficient is None else live | (terms.entropy_coefficient != 0)


def _take(batch: PolicyBatch, index: torch.Tensor) -> PolicyBatch:
    """Some tokens, for losses that take each by itself: completions mean nothing here."""
    return batch.take(index, len(index) * torch.arange(2, device=index.device))


def _unit(batch: PolicyBatch, spec: PolicyLossSpec) -> torch.Tensor:
    """0-d: the size of the loss's derivatives, but for ratio and advantage."""
    if not batch.weights.numel():
        return batch.weights.new_ones(())
    unit = batch.weights.amax()
    if batch.entropy_weights is not None:
        unit = torch.maximum(unit, abs(spec.entropy_coef) * batch.entropy_weights.amax())
    return torch.where(unit > 0, unit, 1)
