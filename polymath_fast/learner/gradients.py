"""The gradient of all trained parameters in one flat float32 tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class FlatGradient:
    """Adds up what backward passes leave on the parameters, and takes it off them.

    After `zero` the first backward pass writes instead of adding, so clearing costs no pass over
    memory; only parameters that no pass reached are cleared, when the whole is read.
    """

    def __init__(self, elements: int, device: torch.device):
        self._flat = torch.zeros(elements, device=device)
        self._parts: list[Tensor] = []
        self._stale: set[int] = set()

    def gather(self, parameters: Iterable[tuple[nn.Parameter, tuple[int, int]]]) -> None:
        """Collect gradients of each parameter in its span of elements, from now on."""
        for parameter, (start, stop) in parameters:
            self._parts.append(self._flat[start:stop].view(parameter.shape))
            parameter.register_post_accumulate_grad_hook(self._hook(len(self._parts) - 1))

    def whole(self) -> Tensor:
        """(elements,) float32: the sum since the last `zero`."""
        for index in self._stale:
            self._parts[index].zero_()
        self._stale.clear()
        return self._flat

    def zero(self) -> None:
        """Forget everything."""
        self._stale.update(range(len(self._parts)))

    def _hook(self, index: int):
        part, stale = self._parts[index], self._stale

        def take(parameter: nn.Parameter) -> None:
            if index in stale:
                stale.remove(index)
                part.copy_(parameter.grad)
            else:
                part.add_(parameter.grad)
            parameter.grad = None

        return take
