"""One small optimizer in every form, whole or in parts, and updates of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from polymath_fast.config import Config
from polymath_fast.kernels.flat_adamw import PART
from polymath_fast.learner.flat_storage import FlatStorage
from polymath_fast.learner.optimizer import FlatAdamW
from polymath_fast.ranks import ALONE, Ranks

SETTINGS: dict[str, Any] = {"weight_decay": 0.1, "max_grad_norm": 0.7, "num_processes": 3}
FORMS = {
    "float32 master": (torch.bfloat16, {}),
    "remainder": (torch.bfloat16, {"master_weights": "remainder"}),
    "float32 weights": (torch.float32, {}),
    "off-loaded": (torch.bfloat16, {"master_weights": "remainder", "offload_optimizer": True}),
}
STORAGES = pytest.mark.parametrize("foreign", [False, True], ids=["own storage", "foreign storage"])
SHAPES = {"table": (3, PART // 2 + 77), "inner": (5, 300), "scale": (PART // 4,)}
PLACES = {"inner": PART + 9, "scale": 7, "table": PART + 3000}  # with gaps, in another order


class Model(nn.Module):
    """Weights that end neither with a part nor with each other."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            values = torch.randn(shape, generator=generator).to(dtype)
            setattr(self, name, nn.Parameter(values))


def made(form: str, foreign: bool, ranks: Ranks = ALONE) -> FlatAdamW:
    """The optimizer of one process; alone it keeps everything."""
    dtype, more = FORMS[form]
    more = more | {"shard_optimizer": ranks.size > 1}
    storage = None
    if foreign:
        room = torch.zeros(3 * PART + 999, dtype=dtype)
        storage = FlatStorage(room, {name: (PLACES[name], SHAPES[name]) for name in SHAPES})
    model = Model(dtype)
    optimizer = FlatAdamW(model, Config(**SETTINGS | more), storage, ranks)
    optimizer.model = model
    return optimizer


def train(optimizer: FlatAdamW, steps: range, share: int = 1) -> list[float]:
    """Updates with gradients of which each process has an equal, exact share; their norms."""
    norms = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in optimizer.model.parameters():
            drawn = torch.randint(-64, 64, parameter.shape, generator=generator) * 3 / 128
            (parameter * (drawn / share).to(parameter)).sum().backward()
        norm, updated = optimizer.step(1e-3)
        assert updated
        norms.append(norm.item())
    return norms
