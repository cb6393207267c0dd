"""Gradients of an LM head from chunks of unnormalised probabilities: two dense products a chunk."""

from __future__ import annotations

import torch

from polymath_fast.kernels.triton.gradient_kernels import (
    bonus_kernel,
    column_sums_kernel,
    hidden_rows_kernel,
    scaled_rows_kernel,
    target_sums_kernel,
)
from polymath_fast.kernels.triton.head import Chunk, Head
from polymath_fast.kernels.triton.products import add_product, product

BLOCK = 1024


class HeadGradient:
    """Sums up the gradients of hidden, weight and bias.

    Args:
        needs: whether hidden, weight, bias want a gradient.
        unit: 0-d, fp32, above 0: about how large the loss's derivatives are. Small factors on
            hidden states would leave the range of fp16; relative to `unit` they do not.
    """

    def __init__(self, head: Head, needs: tuple[bool, bool, bool], unit: torch.Tensor) -> None:
        self.head, self._unit = head, unit
        hidden, weight = head.hidden, head.weight
        device = hidden.device
        self.d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        if not needs[0]:
            self.d_hidden = None
        self._d_weight = torch.zeros(weight.shape, device=device) if needs[1] else None
        self._d_bias = torch.zeros(head.vocab, device=device) if needs[2] else None
        self._by_target = torch.zeros(len(hidden), device=device)

    def add(self, chunk: Chunk, g: torch.Tensor, g_entropy: torch.Tensor | None) -> None:
        """g, g_entropy (C,): the loss's derivatives by log-prob and entropy of the chunk's rows."""
        with torch.cuda.device_of(g):
            a, b = self._factors(chunk, g.float(), g_entropy)
            self._by_target[chunk.index] = b
            if self.d_hidden is not None:
                self._add_hidden(chunk, a, b)
            if self._d_weight is not None:
                self._add_weight(chunk, a)
            if self._d_bias is not None:
                self._add_bias(chunk, a)

    def _factors(
        self, chunk: Chunk, g: torch.Tensor, g_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """a, b (C,) with: gradient by logits = a exps + b one_hot(target); makes `exps` fit."""
        logprob, entropy, rest, inverse = chunk.found
        scale = 1 / self.head.temperature
        sound = logprob.isfinite()
        g = torch.where(sound, g, 0)
        if g_entropy is None:
            a = -g * inverse * scale
            b = g * rest * scale
        else:
            g_entropy = torch.where(sound, g_entropy.float(), 0)
            unit = torch.maximum(g.abs(), g_entropy.abs())
            bonus_kernel[(len(g),)](
                chunk.exps,
                chunk.found,
                g,
                g_entropy,
                unit,
                chunk.exps.stride(0),
                self.head.vocab,
                chunk.found.stride(0),
                BLOCK=4096,
                num_warps=8,
            )
            a = -unit * inverse * scale
            b = (g * rest - g_entropy * logprob.exp() * (logprob + entropy)) * scale
        return torch.where(sound, a, 0), torch.where(sound, b, 0)

    def _add_hidden(self, chunk: Chunk, a: torch.Tensor, b: torch.Tensor) -> None:
        weight, depth = self.head.weight, self.head.depth
        summed = torch.empty(len(a), depth, device=a.device)
        product(chunk.exps, weight, summed)
        hidden_rows_kernel[(len(a),)](
            summed,
            weight,
            chunk.index,
            chunk.targets,
            a,
            b,
            self.d_hidden,
            weight.stride(0),
            self.d_hidden.stride(0),
            depth,
            BLOCK=BLOCK,
            num_warps=4,
        )

    def _add_weight(self, chunk: Chunk, a: torch.Tensor) -> None:
        hidden = self.head.hidden
        scaled = torch.empty(len(a), self.head.depth, dtype=hidden.dtype, device=a.device)
        scaled_rows_kernel[(len(a),)](
            hidden,
            chunk.index,
            a,
            self._unit,
            scaled,
            hidden.stride(0),
            self.head.depth,
            BLOCK=BLOCK,
            num_warps=4,
        )
        add_product(chunk.exps.T, scaled, self._d_weight)

    def _add_bias(self, chunk: Chunk, a: torch.Tensor) -> None:
        vocab = self.head.vocab
        column_sums_kernel[(-(-vocab // 128),)](
            chunk.exps,
            a,
            self._unit,
            self._d_bias,
            chunk.exps.stride(0),
            vocab,
            len(a),
            ROWS=32,
            BLOCK=128,
            num_warps=4,
        )

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Gradients of hidden, weight and bias, in their dtypes; None where none is wanted."""
        head = self.head
        if len(head.hidden) and (self._d_weight is not None or self._d_bias is not None):
            self._add_targets()
        d_weight = d_bias = None
        if self._d_weight is not None:
            d_weight = self._results(self._d_weight, head.weight)
        if self._d_bias is not None:
            d_bias = self._results(self._d_bias, head.bias)
        return self.d_hidden, d_weight, d_bias

    def _results(self, summed: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Sums in their unit -> gradient in the dtype of `like`, in one pass."""
        if like.dtype == summed.dtype:
            return summed.mul_(self._unit)
        return torch.mul(summed, self._unit, out=torch.empty_like(summed, dtype=like.dtype))

    def _add_targets(self) -> None:
        hidden, count = self.head.hidden, len(self.head.hidden)
        by_target, order = self.head.targets.sort(stable=True)
        d_weight = self._d_weight
        columns = -(-self.head.depth // 128)
        if d_weight is None:
            # only a bias is trained: its sums need no column of the hidden states
            d_weight, columns = torch.empty(0, device=hidden.device), 1
        with torch.cuda.device_of(hidden):
            target_sums_kernel[(count, columns)](
                hidden,
                order,
                by_target,
                self._by_target,
                self._unit,
                d_weight,
                self._d_bias,
                hidden.stride(0),
                self.head.depth if self._d_weight is not None else 0,
                self.head.vocab,
                count,
                BIAS=self._d_bias is not None,
                BLOCK=128,
                ROWS=16,
                num_warps=4,
            )
