"""Gradients of an LM head from chunks of unnormalised probabilities: two dense products a chunk."""

from __future__ import annotations

import torch

from polymath_fast.kernels.scratch import Scratch
from polymath_fast.kernels.triton.gradient_kernels import (
    bonus_kernel,
    column_sums_kernel,
    hidden_rows_kernel,
    scaled_rows_kernel,
    target_sums_kernel,
)
from polymath_fast.kernels.triton.head import Chunk, Head
from polymath_fast.kernels.triton.products import (
    hidden_product,
    product,
    weight_product,
)
from polymath_fast.kernels.triton.vocabulary import Columns, Vocabulary
from polymath_fast.kernels.triton.vocabulary_kernels import add_rows_kernel

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
        self._chooses = self.vocabulary is not None and self.vocabulary.room > 0
        hidden, device = head.hidden, head.hidden.device
        self.d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        if not needs[0]:
            self.d_hidden = None
        self._scratch = Scratch(device)
        self._d_weight = self._zeros_like_weight() if needs[1] else None
        self._d_bias = (
            torch.zeros(head.vocab, device=device, dtype=torch.float32) if needs[2] else None
        )
        self._by_target = torch.zeros(len(hidden), device=device, dtype=torch.float32)
        # where columns are chosen, the weight's gradient has some rows' targets already
        self._by_target_left = torch.zeros_like(self._by_target) if self._chooses else None

    def add(self, chunk: Chunk, g: torch.Tensor, g_entropy: torch.Tensor | None) -> None:
        """g, g_entropy (C,): the loss's derivatives by log-prob and entropy of the chunk's rows."""
        if not len(g):
            return
        with torch.cuda.device_of(g):
            a, b = self._factors(chunk, g.float(), g_entropy)
            if self._d_bias is not None:
                self._add_bias(chunk, a)
            self._by_target[chunk.index] = b
            if not self._chooses:
                self._add_all(chunk, a, b, chunk.live)
                return
            largest = g.abs().amax() / self.head.temperature
            good = self._add_some(chunk, self.vocabulary.choose(chunk, a, largest), a, b)
            self._by_target_left[chunk.index] = torch.where(good, 0, b)
            self._add_all(chunk, a, b, torch.where(good, 0, chunk.live))

    def _add_all(self, chunk: Chunk, a: torch.Tensor, b: torch.Tensor, live: torch.Tensor) -> None:
        """Gradients from all columns, of the first `live` rows."""
        if self.head.hidden.dtype == torch.float32:
            self._add_single(chunk, a, b)
            return
        if self.d_hidden is not None:
            weight = self.head.weight
            places = (chunk.index, chunk.targets)
            hidden_product(chunk.exps, weight, weight, live, None, a, b, *places, self.d_hidden)
        if self._d_weight is not None:
            scaled = self._scaled_rows(chunk, a)
            weight_product(chunk.exps, scaled, live, None, self._d_weight, add=True)

    def _add_single(self, chunk: Chunk, a: torch.Tensor, b: torch.Tensor) -> None:
        """The same in fp32, by cuBLAS: rows without a gradient multiply zeros."""
        if self.d_hidden is not None:
            self._add_hidden(chunk, a, b)
        if self._d_weight is not None:
            self._d_weight.addmm_(chunk.exps.T, self._scaled_rows(chunk, a))

    def _add_some(
        self, chunk: Chunk, columns: Columns, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        """Gradients from some columns; 0-d bool, False if they are not near enough."""
        hidden_norm = weight_norm = some = None
        live, width = chunk.live, columns.width
        if self.d_hidden is not None:
            places = (chunk.index, chunk.targets)
            hidden_product(
                columns.exps,
                columns.weight,
                self.head.weight,
                live,
                width,
                a,
                b,
                *places,
                self.d_hidden,
            )
            hidden_norm = _norm(self.d_hidden[chunk.index])
        if self._d_weight is not None:
            shape = (self.vocabulary.room, self.head.depth)
            some = self.vocabulary.buffer("gradient", shape, torch.float32)
            weight_product(columns.exps, self._scaled_rows(chunk, a), live, width, some, add=False)
            by_target, order = columns.targets.sort(stable=True)
            self._sum_targets(chunk.hidden, order, by_target, b, some, None)
            made = torch.arange(len(some), device=some.device) < width
            lengths = torch.linalg.vector_norm(some, dim=1)
            weight_norm = _norm(torch.where(made, lengths, 0)) * self._unit
        good = self.vocabulary.accept(columns, live, hidden_norm, weight_norm)
        if some is not None:
            add_rows_kernel[(len(some),)](
                some,
                columns.live,
                torch.where(good, width, 0),
                self._d_weight,
                self.head.depth,
                BLOCK=BLOCK,
                num_warps=4,
            )
        return good

    def _factors(
        self, chunk: Chunk, g: torch.Tensor, g_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """a, b (C,) with: gradient by logits = a exps + b one_hot(target); makes `exps` fit."""
        logprob, entropy, rest, inverse = chunk.found
        scale = 1 / self.head.temperature
        inside = torch.arange(len(g), device=g.device) < chunk.live
        sound = logprob.isfinite() & inside
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
        """Writes the chunk's rows of the gradient of hidden."""
        out, depth, weight = self.d_hidden, self.head.depth, self.head.weight
        summed = torch.empty(len(a), depth, device=a.device, dtype=torch.float32)
        product(chunk.exps, weight, summed)
        hidden_rows_kernel[(len(a),)](
            summed,
            weight,
            chunk.index,
            chunk.targets,
            a,
            b,
            out,
            weight.stride(0),
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
            chunk.live,
            self._d_bias,
            chunk.exps.stride(0),
            vocab,
            ROWS=32,
            BLOCK=128,
            num_warps=4,
        )

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Gradients of hidden, weight and bias, in their dtypes; None where none is wanted."""
        head = self.head
        head.release()
        if self.vocabulary is not None:
            self.vocabulary.release()
        if len(head.hidden) and (self._d_weight is not None or self._d_bias is not None):
            by_target, order = head.targets.sort(stable=True)
            rows = (head.hidden, order, by_target)
            if not self._chooses:
                self._sum_targets(*rows, self._by_target, self._d_weight, self._d_bias)
            else:
                if self._d_weight is not None:
                    self._sum_targets(*rows, self._by_target_left, self._d_weight, None)
                if self._d_bias is not None:
                    self._sum_targets(*rows, self._by_target, None, self._d_bias)
        d_weight = d_bias = None
        if self._d_weight is not None:
            d_weight = self._results(self._d_weight, head.weight)
            self._d_weight = None
            self._scratch.release()
        if self._d_bias is not None:
            d_bias = self._results(self._d_bias, head.bias)
        return self.d_hidden, d_weight, d_bias

    def _zeros_like_weight(self) -> torch.Tensor:
        """(V, H) fp32; scratch memory where `_results` converts it, as fp32 it is the result."""
        weight = self.head.weight
        if weight.dtype == torch.float32:
            return torch.zeros(weight.shape, device=weight.device, dtype=torch.float32)
        held = self._scratch.buffer("weight_gradient", weight.numel(), torch.float32)
        return held.view(weight.shape).zero_()

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
