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
from polymath_fast.kernels.triton.vocabulary import Columns, Vocabulary

BLOCK = 1024


class HeadGradient:
    """Sums up the gradients of hidden, weight and bias.

    Args:
        needs: whether hidden, weight, bias want a gradient.
        unit: 0-d, fp32, above 0: about how large the loss's derivatives are. Small factors on
            hidden states would leave the range of fp16; relative to `unit` they do not.
        vocab_tol: which columns to leave out, see `vocabulary`; 0: none.
    """

    def __init__(
        self,
        head: Head,
        needs: tuple[bool, bool, bool],
        unit: torch.Tensor,
        vocab_tol: float | str = 0.0,
    ) -> None:
        self.head, self._unit = head, unit
        self.vocabulary = Vocabulary(head.weight, vocab_tol) if vocab_tol else None
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
            if self._d_bias is not None:
                self._add_bias(chunk, a)
            if self.vocabulary is not None and len(a):
                largest = g.abs().amax() / self.head.temperature
                columns = self.vocabulary.choose(chunk, a, largest)
                if columns is not None and self._add_some(chunk, columns, a, b):
                    return
            self._by_target[chunk.index] = b
            if self.d_hidden is not None:
                self._add_hidden(chunk.exps, self.head.weight, chunk, a, b)
            if self._d_weight is not None:
                add_product(chunk.exps.T, self._scaled_rows(chunk, a), self._d_weight)

    def _add_some(self, chunk: Chunk, columns: Columns, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Gradients from some columns; False, and nothing added, if they are not near enough."""
        some = hidden_norm = weight_norm = None
        if self.d_hidden is not None:
            self._add_hidden(columns.exps, columns.weight, chunk, a, b)
            hidden_norm = _norm(self.d_hidden[chunk.index])
        if self._d_weight is not None:
            some = torch.empty(len(columns.live), self.head.depth, device=a.device)
            product(columns.exps.T, self._scaled_rows(chunk, a), some)
            by_target, order = columns.targets.sort(stable=True)
            self._sum_targets(chunk.hidden, order, by_target, b, some, None)
            weight_norm = _norm(some) * self._unit
        if not self.vocabulary.accept(columns, hidden_norm, weight_norm):
            return False
        if some is not None:
            self._d_weight.index_add_(0, columns.live, some)
        if self._d_bias is not None:
            by_target, order = chunk.targets.sort(stable=True)
            self._sum_targets(chunk.hidden, order, by_target, b, None, self._d_bias)
        return True

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

    def _add_hidden(
        self,
        exps: torch.Tensor,
        weight: torch.Tensor,
        chunk: Chunk,
        a: torch.Tensor,
        b: torch.Tensor,
    ) -> None:
        """Writes the chunk's rows of the gradient of hidden."""
        out, depth = self.d_hidden, self.head.depth
        summed = torch.empty(len(a), depth, device=a.device)
        product(exps, weight, summed)
        hidden_rows_kernel[(len(a),)](
            summed,
            self.head.weight,
            chunk.index,
            chunk.targets,
            a,
            b,
            out,
            self.head.weight.stride(0),
            out.stride(0),
            depth,
            BLOCK=BLOCK,
            num_warps=4,
        )

    def _scaled_rows(self, chunk: Chunk, a: torch.Tensor) -> torch.Tensor:
        """(C, H) hidden states times a / unit."""
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
        return scaled

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
            by_target, order = head.targets.sort(stable=True)
            sums = (self._d_weight, self._d_bias)
            self._sum_targets(head.hidden, order, by_target, self._by_target, *sums)
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

    def _sum_targets(
        self,
        hidden: torch.Tensor,
        order: torch.Tensor,
        by_target: torch.Tensor,
        b: torch.Tensor,
        d_weight: torch.Tensor | None,
        d_bias: torch.Tensor | None,
    ) -> None:
        """Adds each row's share b of its target to d_weight (K, H) and d_bias (K,)."""
        held = d_weight if d_weight is not None else d_bias
        depth = 0 if d_weight is None else self.head.depth
        with torch.cuda.device_of(hidden):
            target_sums_kernel[(len(b), max(-(-depth // 128), 1))](
                hidden,
                order,
                by_target,
                b,
                self._unit,
                held,
                d_bias,
                hidden.stride(0),
                depth,
                len(held),
                len(b),
                BIAS=d_bias is not None,
                BLOCK=128,
                ROWS=16,
                num_warps=4,
            )


def _norm(values: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.float32)
