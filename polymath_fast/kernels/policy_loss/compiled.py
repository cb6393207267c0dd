"""The policy loss as an operator that torch.compile keeps inside its graphs.

The operator takes log-probs to the loss, the loss's slopes by them and the metrics, in one list of
tensors whose length follows from the spec. The spec gets in as text (`PolicyLossSpec.packed`): a
graph is made for a set of options, and used again for other tensors, lengths and divisors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polymath_fast.kernels import checks
from polymath_fast.kernels.policy_loss.batch import prepare
from polymath_fast.kernels.policy_loss.input_checks import check_logprobs, given_spec
from polymath_fast.kernels.policy_loss.metrics import metric_names, summarize
from polymath_fast.kernels.policy_loss.output import PolicyLossOutput
from polymath_fast.kernels.policy_loss.packed import steady_sum
from polymath_fast.kernels.policy_loss.spec import PolicyLossSpec
from polymath_fast.kernels.policy_loss.terms import policy_terms


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    entropy: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    mask: Tensor | None = None,
    spec: PolicyLossSpec | None = None,
) -> PolicyLossOutput:
    """As `kernels.policy_loss`."""
    spec = given_spec(spec)
    dtype = checks.working_dtype(logprobs.dtype)
    logprobs = logprobs.to(dtype)
    entropy = None if entropy is None else entropy.to(dtype)
    loss, *rest = torch.ops.polymath_fast.policy_loss(
        logprobs,
        entropy,
        advantages,
        cu_seqlens,
        old_logprobs,
        ref_logprobs,
        sampling_logprobs,
        importance_weights,
        mask,
        *crossing(spec),
    )
    names = names_of(spec, entropy, sampling_logprobs, importance_weights)
    values = [value.detach() for value in rest[len(rest) - len(names) :]]
    held = None if entropy is None else entropy.detach()
    return PolicyLossOutput(loss, logprobs.detach(), held, dict(zip(names, values, strict=True)))


def crossing(spec: PolicyLossSpec) -> tuple[str, Tensor | None, Tensor | None]:
    """A spec as an operator's arguments; `spec_of` is the way back.

    A float argument would be a constant of the graph, so divisors cross as 0-d tensors, on the CPU
    because the operator reads them.
    """
    return (spec.packed, *(_scalar(value) for value in (spec.normalizer, spec.entropy_normalizer)))


def spec_of(
    text: str, normalizer: Tensor | None, entropy_normalizer: Tensor | None
) -> PolicyLossSpec:
    """The spec that `crossing` took apart."""
    divisors = (
        None if value is None else value.item() for value in (normalizer, entropy_normalizer)
    )
    return PolicyLossSpec.unpacked(text, *divisors)


def _scalar(value: float | None) -> Tensor | None:
    if value is None:
        return None
    # of what makes a tensor of a number, the compiler keeps only arithmetic free of that number
    return value * torch.ones((), dtype=torch.float64, device="cpu")


def names_of(
    spec: PolicyLossSpec,
    entropy: Tensor | None,
    sampling_logprobs: Tensor | None,
    importance_weights: Tensor | None,
) -> tuple[str, ...]:
    """Of the metrics that an operator with these inputs returns."""
    return metric_names(
        spec,
        entropy=entropy is not None,
        sampling=sampling_logprobs is not None,
        weights=importance_weights is not None,
    )


def metrics_like(
    names: tuple[str, ...], like: Tensor, multiplicity: Tensor | None = None
) -> list[Tensor]:
    """0-d tensors of the metrics' dtypes; `like` has the working dtype."""
    counts = {"nonfinite_rows"} if multiplicity is not None else {"nonfinite_rows", "tokens"}
    return [like.new_empty((), dtype=torch.int64 if n in counts else like.dtype) for n in names]


@torch.library.custom_op("polymath_fast::policy_loss", mutates_args=())
def _policy_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    sampling_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    mask: Tensor | None,
    spec: str,
    normalizer: Tensor | None,
    entropy_normalizer: Tensor | None,
) -> list[Tensor]:
    options = spec_of(spec, normalizer, entropy_normalizer)
    check_logprobs(logprobs, entropy, options)
    batch = prepare(
        options,
        logprobs.numel(),
        logprobs.dtype,
        logprobs.device,
        advantages,
        cu_seqlens,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampling_logprobs=sampling_logprobs,
        importance_weights=importance_weights,
        mask=mask,
    )
    terms = policy_terms(batch, logprobs, entropy, options)
    metrics = summarize(batch, terms, logprobs, entropy)
    assert tuple(metrics) == names_of(options, entropy, sampling_logprobs, importance_weights)
    slopes = [terms.coefficient]
    if terms.entropy_coefficient is not None:
        slopes.append(terms.entropy_coefficient)
    return [steady_sum(terms.loss), *slopes, *metrics.values()]


@_policy_loss.register_fake
def _(
    logprobs: Tensor,
    entropy: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    sampling_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    mask: Tensor | None,
    spec: str,
    normalizer: Tensor | None,
    entropy_normalizer: Tensor | None,
) -> list[Tensor]:
    options = PolicyLossSpec.unpacked_options(spec)
    slopes = 2 if options.entropy_coef else 1
    names = names_of(options, entropy, sampling_logprobs, importance_weights)
    found = [logprobs.new_empty(logprobs.shape) for _ in range(slopes)]
    return [logprobs.new_empty(()), *found, *metrics_like(names, logprobs)]


def _keep_slopes(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.bonus = bool(PolicyLossSpec.unpacked_options(inputs[9]).entropy_coef)
    ctx.save_for_backward(*output[1 : 3 if ctx.bonus else 2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: list[Tensor | None]) -> Any:
    nothing = (None,) * 10
    if upstream[0] is None:
        return None, None, *nothing
    slope, *entropy_slope = ctx.saved_tensors
    by_entropy = upstream[0] * entropy_slope[0] if ctx.bonus else None
    return upstream[0] * slope, by_entropy, *nothing


_policy_loss.register_autograd(_backward, setup_context=_keep_slopes)
