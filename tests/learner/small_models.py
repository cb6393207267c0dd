"""A model of three parameters and data for it, for tests of the optimizer."""

from __future__ import annotations

import torch
from torch import nn

SETTINGS = {
    "learning_rate": 3e-3, "weight_decay": 0.1, "max_grad_norm": 0.7, "adam_beta2": 0.98,
}  # fmt: skip


class Model(nn.Module):
    """Two matrices, one of them used twice as a tied head is, and a vector."""

    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        make = lambda *s: nn.Parameter(torch.randn(*s, generator=generator).to(dtype))  # noqa: E731
        self.scale, self.table, self.inner = make(6), make(11, 6), make(6, 6)

    def forward(self, x):
        hidden = torch.tanh(x @ self.inner) * self.scale + self.table[: len(x)]
        return (hidden @ self.table.T).square().mean()


def batches(count):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 6, generator=generator) for _ in range(count)]
