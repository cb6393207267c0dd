"""The embedding of a model on a CPU, whose gradient is that of the rows that were read.

torch fills a gradient of the whole vocabulary for every backward pass.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from polymath_fast.kernels.autograd import first_order
from polymath_fast.kernels.cpu.sink import add_rows, sink_of


def fuse_embedding(embedding: nn.Module) -> None:
    """Replace the forward of `embedding`, if it looks rows up and does nothing else."""
    plain = type(embedding) is nn.Embedding and embedding.weight.device.type == "cpu"
    if plain and not (embedding.max_norm or embedding.scale_grad_by_freq or embedding.sparse):
        embedding.forward = MethodType(_forward, embedding)


def _forward(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    return Rows.apply(ids, embedding.weight, embedding.padding_idx)


class Rows(torch.autograd.Function):
    """ids (...), weight (V, H) -> (..., H). Rows `padding` have no gradient, as in torch."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.sink, ctx.like, ctx.padding = sink_of(weight), weight.detach(), padding
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor | None, None]:
        (ids,) = ctx.saved_tensors
        index, rows = ids.reshape(-1), upstream.reshape(-1, upstream.shape[-1])
        if ctx.padding is not None:
            kept = index != ctx.padding
            index, rows = index[kept], rows[kept]
        if ctx.sink is not None:
            add_rows(ctx.sink, index, rows)
            return None, None, None
        found = torch.zeros(ctx.like.shape, dtype=torch.promote_types(rows.dtype, torch.float32))
        add_rows(lambda: (found, True), index, rows)
        return None, found.to(ctx.like.dtype), None
