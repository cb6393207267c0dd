"""Where the gradient of a weight is summed up in float32, past autograd.

A weight may carry `gradient_sink`, a function that returns the float32 tensor of the weight's shape
and whether it holds anything yet. Whoever computes that weight's gradient adds it there and gives
autograd nothing: no copy in the weight's dtype, and no rounding to it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Sink = Callable[[], tuple[Tensor, bool]]


def sink_of(weight: Tensor | None) -> Sink | None:
    """The weight's sink; None where it has none, and autograd takes the gradient."""
    return getattr(weight, "gradient_sink", None)


def add_scaled(sink: Sink, gradient: Tensor, factor: float) -> None:
    """Add factor times `gradient`, float32 of the weight's shape."""
    total, add = sink()
    if add:
        total.add_(gradient, alpha=factor)
    elif factor == 1:
        total.copy_(gradient)
    else:
        total.copy_(gradient).mul_(factor)


def add_rows(sink: Sink, index: Tensor, gradient: Tensor) -> None:
    """Add row i of `gradient` (N, H) to row index[i]; equal rows add up, always in one order."""
    total, add = sink()
    if not add:
        total.zero_()
    total.index_add_(0, index, gradient.to(total.dtype))
