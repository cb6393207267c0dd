"""The gradient of all trained parameters in one flat float32 tensor."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from polymath_fast.kernels import scratch
from polymath_fast.kernels.cpu import workspace


class FlatGradient:
    """Adds up what backward passes leave on the parameters, and takes it off them.

    After `zero` the first backward pass writes instead of adding, so clearing costs no pass over
    memory; only parameters that no pass reached are cleared, when the whole is read.
    """

    def __init__(self, elements: int, device: torch.device):
        self._flat = torch.zeros(elements, device=device, dtype=torch.float32)
        self._parts: list[Tensor] = []
        self._stale: set[int] = set()

    def gather(self, parameters: Iterable[tuple[nn.Parameter, tuple[int, int]]]) -> None:
        """Collect gradients of each parameter in its span of elements, from now on."""
        for parameter, (start, stop) in parameters:
            self._parts.append(self._flat[start:stop].view(parameter.shape))
            parameter.gradient_sink = functools.partial(self._open, len(self._parts) - 1)
            parameter.register_post_accumulate_grad_hook(self._hook(len(self._parts) - 1))

    def _open(self, index: int) -> tuple[Tensor, bool]:
        """The float32 part of a parameter, for a backward pass that fills it itself and gives
        autograd nothing, and whether it must add to what is there."""
        add = index not in self._stale
        self._stale.discard(index)
        return self._parts[index], add

    def whole(self) -> Tensor:
        """(elements,) float32: the sum since the last `zero`."""
        for index in self._stale:
            self._parts[index].zero_()
        self._stale.clear()
        return self._flat

    def zero(self) -> None:
        """Forget everything."""
        self._stale.update(range(len(self._parts)))

    def release(self) -> None:
        """`zero`, and a CPU lets the system have the memory until the next backward pass."""
        self.zero()
        if self._flat.device.type == "cpu":
            workspace.give_back(self._flat)

    @contextmanager
    def lend(self) -> Iterator[scratch.Arena]:
        """`zero`, and inside operators take their scratch memory from here."""
        self.zero()
        with scratch.lend(scratch.Arena([self._flat.untyped_storage()])) as arena:
            yield arena

    def _hook(self, index: int):
        def take(parameter: nn.Parameter) -> None:
            if parameter.grad is None:  # it went straight to the sink
                return
            part, add = self._open(index)
            part.add_(parameter.grad) if add else part.copy_(parameter.grad)
            parameter.grad = None

        return take
