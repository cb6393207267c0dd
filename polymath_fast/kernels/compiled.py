"""Operators that torch.compile keeps inside its graphs: where no gradient is wanted.

Their values have known shapes and dtypes, so they are registered with torch.library. With gradients
an operator runs between two graphs instead (`dispatch.untraced`): what a GPU kernel saves from its
forward pass for its backward pass has no place in a graph of tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polymath_fast.kernels import checks


def token_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """As `kernels.token_logprobs`, without gradients."""
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
    """As `kernels.linear_logprobs`, without gradients."""
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
def _(logits: Tensor, targets: Tensor, temperature: float, impl: str) -> tuple[Tensor, Tensor]:
    return _rows_like(logits)


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
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return _rows_like(hidden)


def _rows_like(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) log-probs and entropies of N rows."""
    dtype = checks.working_dtype(matrix.dtype)
    return tuple(torch.empty(matrix.shape[0], dtype=dtype, device=matrix.device) for _ in range(2))
