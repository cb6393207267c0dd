"""Log-probs and entropies of an LM head on a GPU, without logits in memory.

2 N H V operations forward and, as the upstream gradient is not known by then, 6 N H V backward: the
product is done again chunk by chunk. Where one chunk holds all rows its exponentials are kept, and
backward is 4 N H V. Bytes of bf16: as `linear_grpo_loss`, in a forward pass without gradient 2 V H
a group of tiles and 12 bytes a row and tile.
"""

from __future__ import annotations

from typing import Any

import torch

from polymath_fast.kernels.autograd import first_order, wanted
from polymath_fast.kernels.triton.head import Chunk, Head
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
    # inside of `forward` nothing tells a call under no_grad from others
    keeps = any(wanted((hidden, weight, bias)))
    return _LinearLogprobs.apply(hidden, weight, bias, targets, temperature, keeps)


def gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    by_logprob: torch.Tensor,
    by_entropy: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, ...]:
    """By hidden, weight and bias, of a loss with these derivatives (N,) by their log-probs."""
    head = Head(hidden, weight, bias, targets, temperature)
    chunk = _only_chunk(head) if 0 < len(hidden) <= head.rows else None
    return _gradients(head, chunk, by_logprob, by_entropy, needs)


def _only_chunk(head: Head) -> Chunk:
    """All rows of a head at once, with their exponentials."""
    count, device = len(head.hidden), head.hidden.device
    index = torch.arange(count, device=device)
    live = torch.full((1,), count, dtype=torch.int32, device=device)
    return head.chunk(index, slice(0, count), live)


def _gradients(
    head: Head,
    kept: Chunk | None,
    g: torch.Tensor | None,
    g_entropy: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, ...]:
    """kept: the only chunk of the head, where all rows fit in one."""
    g = torch.zeros_like(g_entropy) if g is None else g
    size = g.abs() if g_entropy is None else torch.maximum(g.abs(), g_entropy.abs())
    unit = size.amax() if len(size) else size.new_ones(())
    unit = torch.where(unit > 0, unit, 1).float()
    gradient = HeadGradient(head, needs, unit)
    if kept is not None:
        gradient.add(kept, g, g_entropy)
        return gradient.finish()
    for chunk in live_chunks(head, size != 0, others=False):
        rows = chunk.index
        gradient.add(chunk, g[rows], None if g_entropy is None else g_entropy[rows])
    return gradient.finish()


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, temperature, keeps):  # noqa: ANN001
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.temperature, ctx.kept = temperature, None
        head = Head(hidden, weight, bias, targets, temperature)
        count = len(hidden)
        if keeps and 0 < count <= head.rows:
            chunk = _only_chunk(head)
            ctx.kept = head, chunk
            return chunk.found[0].clone(), chunk.found[1].clone()
        found = torch.empty(2, count, device=hidden.device, dtype=torch.float32)
        for chunk in all_chunks(head):
            found[:, chunk.index] = chunk.found[:2]
        head.release()
        return found[0].clone(), found[1].clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, g: torch.Tensor | None, g_entropy: torch.Tensor | None):
        if g is None and g_entropy is None:
            return None, None, None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        head, chunk = kept or (Head(hidden, weight, bias, targets, ctx.temperature), None)
        return *_gradients(head, chunk, g, g_entropy, ctx.needs_input_grad[:3]), None, None, None
