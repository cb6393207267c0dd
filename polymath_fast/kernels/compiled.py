"""Log-probs as operators that torch.compile keeps inside its graphs, with their gradients.

A graph of tensors has no place for what a backward pass usually keeps from its forward pass (tables
of a GPU's kernels, scratch memory), so the backward operators start from the inputs again. Against
a plain call that is one more read of the logits for `token_logprobs`; nothing for
`linear_logprobs`, which multiplies out twice either way, but where one chunk of a GPU holds all
rows. Which implementation runs is decided when the graph runs, in each pass by itself: a default of
`kernels.use` counts where it is in force.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polymath_fast.kernels import checks, dispatch


def token_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """As `kernels.token_logprobs`."""
    return torch.ops.polymath_fast.token_logprobs(logits, targets, temperature, impl)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As `kernels.linear_logprobs`."""
    # what autocast says is known here, not where the compiled graph runs
    hidden, weight, bias = checks.under_autocast(hidden, weight, bias)
    return torch.ops.polymath_fast.linear_logprobs(hidden, weight, targets, bias, temperature, impl)


@torch.library.custom_op("polymath_fast::token_logprobs", mutates_args=())
def _token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, impl: str
) -> tuple[Tensor, Tensor]:
    from polymath_fast.kernels import token_logprobs

    return token_logprobs(logits, targets, temperature=temperature, impl=impl)


@_token_logprobs.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _rows_like(logits)


@torch.library.custom_op("polymath_fast::token_logprobs_gradient", mutates_args=())
def _token_gradient(
    logits: Tensor,
    targets: Tensor,
    by_logprob: Tensor | None,
    by_entropy: Tensor | None,
    temperature: float,
    impl: str,
) -> Tensor:
    implementation = dispatch.resolve("token_logprobs", logits, impl)
    by_logprob = torch.zeros_like(by_entropy) if by_logprob is None else by_logprob
    found = implementation.gradient(logits, targets.long(), temperature, by_logprob, by_entropy)
    return found.contiguous()


@_token_gradient.register_fake
def _(logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _keep_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.temperature, ctx.impl = inputs
    ctx.save_for_backward(logits, targets)
    ctx.set_materialize_grads(False)


def _token_backward(ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None) -> Any:
    if by_logprob is None and by_entropy is None:
        return None, None, None, None
    gradient = torch.ops.polymath_fast.token_logprobs_gradient(
        *ctx.saved_tensors, by_logprob, by_entropy, ctx.temperature, ctx.impl
    )
    return gradient, None, None, None


_token_logprobs.register_autograd(_token_backward, setup_context=_keep_rows)


@torch.library.custom_op("polymath_fast::linear_logprobs", mutates_args=())
def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    from polymath_fast.kernels import linear_logprobs

    return linear_logprobs(hidden, weight, targets, bias=bias, temperature=temperature, impl=impl)


@_linear_logprobs.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _rows_like(hidden)


@torch.library.custom_op("polymath_fast::linear_logprobs_gradient", mutates_args=())
def _linear_gradient(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    by_logprob: Tensor | None,
    by_entropy: Tensor | None,
    temperature: float,
    impl: str,
    by_hidden: bool,
    by_weight: bool,
    by_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    implementation = dispatch.resolve("linear_logprobs", hidden, impl)
    by_logprob = torch.zeros_like(by_entropy) if by_logprob is None else by_logprob
    given = (hidden, weight, targets.long(), bias, temperature, by_logprob, by_entropy)
    found = implementation.gradients(*given, (by_hidden, by_weight, by_bias))
    return tuple(hidden.new_empty(0) if part is None else part.contiguous() for part in found)


@_linear_gradient.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return gradients_like((hidden, weight, bias), rest[-3:])


def _keep_head(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, targets, bias, ctx.temperature, ctx.impl = inputs
    ctx.save_for_backward(hidden, weight, targets, bias)
    ctx.set_materialize_grads(False)


def _linear_backward(ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None) -> Any:
    if by_logprob is None and by_entropy is None:
        return None, None, None, None, None, None
    needs = tuple(ctx.needs_input_grad[place] for place in (0, 1, 3))
    found = torch.ops.polymath_fast.linear_logprobs_gradient(
        *ctx.saved_tensors, by_logprob, by_entropy, ctx.temperature, ctx.impl, *needs
    )
    hidden, weight, bias = (part if need else None for part, need in zip(found, needs, strict=True))
    return hidden, weight, None, bias, None, None


_linear_logprobs.register_autograd(_linear_backward, setup_context=_keep_head)


def gradients_like(
    inputs: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    """What a backward operator returns: contiguous gradients, (0,) where none is wanted."""
    return tuple(
        tensor.new_empty(tensor.shape) if need else inputs[0].new_empty(0)
        for tensor, need in zip(inputs, needs, strict=True)
    )


def _rows_like(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) log-probs and entropies of N rows."""
    dtype = checks.working_dtype(matrix.dtype)
    return tuple(torch.empty(matrix.shape[0], dtype=dtype, device=matrix.device) for _ in range(2))
