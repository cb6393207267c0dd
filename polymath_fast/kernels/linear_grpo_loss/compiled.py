"""The policy loss from the LM head as an operator that torch.compile keeps inside its graphs.

As in a plain call the gradients come with the loss, as further results of the operator; its
backward pass multiplies them by the incoming gradient. That is 1 nearly always: bits are those of a
plain call then, and may differ in the last one where it is no power of two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polymath_fast.kernels import checks, dispatch
from polymath_fast.kernels.autograd import gradients_of, in_fresh_thread, wanted
from polymath_fast.kernels.compiled import gradients_like
from polymath_fast.kernels.linear_grpo_loss import reference
from polymath_fast.kernels.policy_loss import PolicyLossOutput, PolicyLossSpec
from polymath_fast.kernels.policy_loss.compiled import crossing, metrics_like, names_of, spec_of
from polymath_fast.kernels.policy_loss.input_checks import given_spec

VOCABULARY = ("vocab/live_share", "vocab/dropped_mass", "vocab/error_bound")
"""metrics of a call with `vocab_tol` that makes gradients"""
_AUTO = -1.0
"""`vocab_tol="auto"` as a number"""


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    mask: Tensor | None = None,
    multiplicity: Tensor | None = None,
    bias: Tensor | None = None,
    spec: PolicyLossSpec | None = None,
    vocab_tol: float | str = 0.0,
    impl: str = "auto",
) -> PolicyLossOutput:
    """As `kernels.linear_grpo_loss`."""
    spec = given_spec(spec)
    # what autocast says is known here, not where the compiled graph runs
    hidden, weight, bias = checks.under_autocast(hidden, weight, bias)
    needs = wanted((hidden, weight, bias))
    checks.check_vocab_tol(vocab_tol)
    loss, logprobs, entropy, *rest = torch.ops.polymath_fast.linear_grpo_loss(
        hidden,
        weight,
        targets,
        bias,
        advantages,
        cu_seqlens,
        old_logprobs,
        ref_logprobs,
        sampling_logprobs,
        importance_weights,
        mask,
        multiplicity,
        *crossing(spec),
        _AUTO if vocab_tol == "auto" else float(vocab_tol),
        impl,
        *needs,
    )
    names = names_of(spec, entropy, sampling_logprobs, importance_weights)
    names += VOCABULARY if vocab_tol and any(needs) else ()
    values = [value.detach() for value in rest[len(needs) :]]
    metrics = dict(zip(names, values, strict=True))
    return PolicyLossOutput(loss, logprobs.detach(), entropy.detach(), metrics)


@torch.library.custom_op("polymath_fast::linear_grpo_loss", mutates_args=())
def _linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    sampling_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    mask: Tensor | None,
    multiplicity: Tensor | None,
    spec: str,
    normalizer: Tensor | None,
    entropy_normalizer: Tensor | None,
    vocab_tol: float,
    impl: str,
    by_hidden: bool,
    by_weight: bool,
    by_bias: bool,
) -> list[Tensor]:
    from polymath_fast.kernels import linear_grpo_loss

    needs = (by_hidden, by_weight, by_bias)
    plain = dispatch.resolve("linear_grpo_loss", hidden, impl) is reference
    outputs = []

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
        out = linear_grpo_loss(
            hidden,
            weight,
            targets,
            advantages,
            cu_seqlens,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            sampling_logprobs=sampling_logprobs,
            importance_weights=importance_weights,
            mask=mask,
            multiplicity=multiplicity,
            bias=bias,
            spec=spec_of(spec, normalizer, entropy_normalizer),
            vocab_tol="auto" if vocab_tol == _AUTO else vocab_tol,
            impl="reference" if plain else impl,
        )
        outputs.append(out)
        return (out.loss,)

    one = hidden.new_ones((), dtype=checks.working_dtype(hidden.dtype))
    given = (loss, (hidden, weight, bias), needs, (one,))
    # fused implementations record one function of Python, which needs no fresh thread
    if plain:
        found = in_fresh_thread(lambda: gradients_of(*given), hidden.device)
    else:
        found = gradients_of(*given)
    (out,) = outputs
    gradients = [hidden.new_empty(0) if part is None else part.contiguous() for part in found]
    # one tensor may hold both
    logprobs, entropy = out.logprobs.clone(), out.entropy.clone()
    return [out.loss.detach(), logprobs, entropy, *gradients, *out.metrics.values()]


@_linear_grpo_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    sampling_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    mask: Tensor | None,
    multiplicity: Tensor | None,
    spec: str,
    normalizer: Tensor | None,
    entropy_normalizer: Tensor | None,
    vocab_tol: float,
    impl: str,
    by_hidden: bool,
    by_weight: bool,
    by_bias: bool,
) -> list[Tensor]:
    needs = (by_hidden, by_weight, by_bias)
    rows = hidden.new_empty(hidden.shape[0], dtype=checks.working_dtype(hidden.dtype))
    options = PolicyLossSpec.unpacked_options(spec)
    names = names_of(options, rows, sampling_logprobs, importance_weights)
    metrics = metrics_like(names, rows, multiplicity)
    if vocab_tol and any(needs):
        metrics += [hidden.new_empty((), dtype=torch.float32) for _ in VOCABULARY]
    gradients = gradients_like((hidden, weight, bias), needs)
    return [rows.new_empty(()), rows, torch.empty_like(rows), *gradients, *metrics]


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*output[3:6])
    ctx.needs = inputs[-3:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: list[Tensor | None]) -> Any:
    nothing = (None,) * 16
    if upstream[0] is None:
        return None, None, None, None, *nothing
    hidden, weight, bias = (
        gradient * upstream[0] if need else None
        for gradient, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return hidden, weight, None, bias, *nothing


_linear_grpo_loss.register_autograd(_backward, setup_context=_keep_gradients)
