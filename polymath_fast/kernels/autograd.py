"""What the operators' autograd functions share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

R = TypeVar("R")


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass whose slopes are constants: differentiating it again is an error.

    torch's once_differentiable lets a second derivative pass in silence where the incoming gradient
    needs none.
    """

    @functools.wraps(backward)
    def call(ctx: Any, *incoming: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this operator has no second derivative: call backward or autograd.grad "
                "without create_graph=True"
            )
        return backward(ctx, *incoming)

    return call


def wanted(inputs: tuple[torch.Tensor | None, ...]) -> tuple[bool, ...]:
    """Of which inputs this call is to have a gradient."""
    return tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)


def detached(inputs: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    """Their values alone."""
    return tuple(None if x is None else x.detach() for x in inputs)


def writable(logits: torch.Tensor) -> bool:
    """Whether the memory of `logits` (N, V) can hold their gradient: not a leaf's, which its owner
    still wants, and no entry stored twice."""
    return not logits.is_leaf and logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1]


def note_written(tensors: Iterable[torch.Tensor]) -> None:
    """Kernels have written `tensors` where autograd does not see it: a backward pass that needs
    what they held is to fail, as after torch's own operators."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def gradients_of(
    function: Callable[..., tuple[torch.Tensor, ...]],
    inputs: tuple[torch.Tensor | None, ...],
    needs: tuple[bool, ...],
    incoming: tuple[torch.Tensor | None, ...],
) -> list[torch.Tensor | None]:
    """Gradients of `inputs` through `function(*inputs)`.

    Args:
        needs: which inputs want a gradient; the others get None.
        incoming: the loss's gradients by what the function returns; None counts as zero.
    """
    with torch.set_grad_enabled(any(needs)):
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(wanted)
            for tensor, wanted in zip(inputs, needs, strict=True)
        ]
        outputs = function(*leaves)
        if not any(needs):
            return [None] * len(needs)
        known = [(out, g) for out, g in zip(outputs, incoming, strict=True) if g is not None]
        outputs, gradients = zip(*known, strict=True)
        wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        found = iter(torch.autograd.grad(outputs, wanted, gradients))
    return [next(found) if need else None for need in needs]


def in_fresh_thread(function: Callable[[], R], device: torch.device) -> R:
    """`function()` in a thread of its own, on the current stream of `device`.

    A registered operator runs below autograd, which is a state of the thread: PyTorch's own
    operations record nothing there.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run() -> R:
        with torch.cuda.stream(stream):
            return function()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()
