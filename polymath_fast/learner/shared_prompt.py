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

    def predicting(self, states: Tensor, hidden_rows: Tensor) -> Tensor:
        """(N, H) states that predict the targets: rows of the prompt's last one and of `states`
        (R, H), see `PackedBatch`."""
        return SharedRows.apply(torch.cat([self.last, states]), hidden_rows)

    def add(self, layer_idx: int, d_keys: Tensor, d_values: Tensor) -> None:
        """Gradients (P, Hkv, D) of one layer, of a pass that autograd does not see."""
        if self._outputs:
            torch.autograd.backward(self._layers[layer_idx], (d_keys, d_values))

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


class SharedRows(torch.autograd.Function):
    """states (T, H), rows (N,) -> (N, H). The gradients of all targets that read one row, such as
    the first tokens of every completion, add up in float32 at least."""

    @staticmethod
    def forward(ctx, states: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = states.shape
        return states.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=wide, device=grad.device)
        if (
            total.is_cuda
        ):  # sorts, where the other one adds in an order that differs from run to run
            total.index_put_((rows,), grad.to(wide), accumulate=True)
        else:
            total.index_add_(0, rows, grad.to(wide))
        return total.to(grad.dtype), None


def _adder(total: Tensor):
    def add(leaf: Tensor) -> None:
        total.add_(leaf.grad)
        leaf.grad = None

    return add
