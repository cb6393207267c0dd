"""Log-probs and entropies of an LM head on a GPU, without logits in memory.

2 N H V operations forward and, as the upstream gradient is not known by then, 6 N H V backward: the
product is done again chunk by chunk. Where one chunk holds all rows its exponentials are kept, and
backward is 4 N H V. Bytes of bf16: as `linear_grpo_loss`, in a forward pass without gradient 2 V H
a group of tiles and 12 bytes a row and tile.
"""

from __future__ import annotations

from typing import Any

import torch

from polymath_fast.kernels.autograd import first_order
from polymath_fast.kernels.triton.head import Head
from polymath_fast.kernels.triton.head_gradient import HeadGradient
from polymath_fast.kernels.triton.live import all_chunks, live_chunks


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`hidden` (N, H), `weight` (V, H), `targets` (N,) int64 -> logprobs (N,), entropy (N,)."""
    return _LinearLogprobs.apply(hidden, weight, bias, targets, temperature)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, temperature):  # noqa: ANN001
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.temperature, ctx.kept = temperature, None
        head = Head(hidden, weight, bias, targets, temperature)
        count = len(hidden)
        if any(ctx.needs_input_grad) and 0 < count <= head.rows:
            index = torch.arange(count, device=hidden.device)
            live = torch.full((1,), count, dtype=torch.int32, device=hidden.device)
            chunk = head.chunk(index, slice(0, count), live)
            ctx.kept = head, chunk
            return chunk.found[0].clone(), chunk.found[1].clone()
        found = torch.empty(2, count, device=hidden.device)
        for chunk in all_chunks(head):
            found[:, chunk.index] = chunk.found[:2]
        return found[0].clone(), found[1].clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, g: torch.Tensor | None, g_entropy: torch.Tensor | None):
        if g is None and g_entropy is None:
            return None, None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        head = kept[0] if kept else Head(hidden, weight, bias, targets, ctx.temperature)
        g = torch.zeros_like(g_entropy) if g is None else g
        size = g.abs() if g_entropy is None else torch.maximum(g.abs(), g_entropy.abs())
        unit = size.amax() if len(size) else size.new_ones(())
        unit = torch.where(unit > 0, unit, 1).float()
        gradient = HeadGradient(head, ctx.needs_input_grad[:3], unit)
        if kept:
            gradient.add(kept[1], g, g_entropy)
        else:
            for chunk in live_chunks(head, size != 0, others=False):
                rows = chunk.index
                gradient.add(chunk, g[rows], None if g_entropy is None else g_entropy[rows])
        return *gradient.finish(), None, None
