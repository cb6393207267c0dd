"""One prompt computed once, forward and backward, for all the micro-batches of its completions."""

from __future__ import annotations

import torch
from torch import Tensor


class SharedPrompt:
    """Keys and values (P, Hkv, D) of every layer and the last hidden state (1, H) of one prompt.

    Micro-batches read leaves, whose gradients add up in float32; `backward` sends the sums through
    the prompt's own graph. By the chain rule that is the gradient of all of them in one pass.
    """

    def __init__(self, length: int):
        self.length = length
        self.last: Tensor | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._outputs: list[Tensor] = []
        self._sums: list[Tensor] = []

    @property
    def complete(self) -> bool:
        """Whether the prompt's own pass is over."""
        return self.last is not None

    def keep(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Take what one layer computed in the prompt's own pass."""
        self._layers[layer_idx] = self._leaf(keys), self._leaf(values)

    def finish(self, last: Tensor) -> None:
        """Take the hidden state that predicts the first token of every completion."""
        self.last = self._leaf(last)

    def extend(self, layer_idx: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of completions (R, Hkv, D) -> (P + R, Hkv, D)."""
        own_keys, own_values = self._layers[layer_idx]
        return torch.cat([own_keys, keys]), torch.cat([own_values, values])

    def backward(self) -> None:
        """The prompt's share of the gradient of everything that read it; the graph is freed."""
        if self._outputs:
            pairs = zip(self._sums, self._outputs, strict=True)
            torch.autograd.backward(self._outputs, [s.to(x.dtype) for s, x in pairs])

    def _leaf(self, output: Tensor) -> Tensor:
        leaf = output.detach()
        if not output.requires_grad:
            return leaf
        wide = torch.promote_types(output.dtype, torch.float32)
        total = torch.zeros(output.shape, dtype=wide, device=output.device)
        self._outputs.append(output)
        self._sums.append(total)
        leaf.requires_grad_().register_post_accumulate_grad_hook(_adder(total))
        return leaf


def _adder(total: Tensor):
    def add(leaf: Tensor) -> None:
        total.add_(leaf.grad)
        leaf.grad = None

    return add
