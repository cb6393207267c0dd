"""The LM head on a CPU, backwards: two dense products over the rows that carry a gradient.

Once the loss has said what the coefficient of each row is, a compiled pass turns the logits of a
block into their gradient, for the rows that have one, without gaps, in a larger buffer. When that
is full, two products make the gradients of `hidden` and `weight` from it, with sums in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from polymath_fast.kernels.active_vocabulary import ROUNDING
from polymath_fast.kernels.cpu import vocabulary
from polymath_fast.kernels.cpu.blocks import PADDING
from polymath_fast.kernels.cpu.head import Head, odd_lines, rows_that_fit
from polymath_fast.kernels.cpu.operands import bits, padded_rows
from polymath_fast.kernels.cpu.workspace import buffer, claim

SLOPES_BYTES = 176 * 2**20
"""of gradient rows at a time; more of them means fewer sums over the weight's gradient"""


class Gradients(NamedTuple):
    """Of hidden, weight and bias, in their dtypes; None where none is wanted."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    metrics: dict[str, torch.Tensor]
    """what was left out of them, where some might be"""


NO_GRADIENTS = Gradients(None, None, None, {})


def capacity(block: int, row_bytes: int, count: int) -> int:
    """Gradient rows that are collected, for blocks of `block` of `count` rows."""
    fitting = rows_that_fit(SLOPES_BYTES, row_bytes, padded_rows(count))
    return max(fitting // PADDING * PADDING, padded_rows(block))  # a product reads whole blocks


class HeadGradient:
    """Collects gradient rows of the logits and turns them into the gradients of the inputs.

    Args:
        needs: whether hidden, weight and bias want a gradient.
        vocab_tol: share of the largest coefficient that a column's slopes must reach to be
            multiplied out, or "auto", see `vocabulary`; 0: all columns.
        to_sink: whether the gradient of the weight is for a `sink`: fp32, and nobody's for long.
    """

    def __init__(
        self,
        head: Head,
        needs: tuple[bool, bool, bool],
        vocab_tol: float | str = 0.0,
        to_sink: bool = False,
    ) -> None:
        self.head = head
        self._report = vocabulary.VocabReport()
        self._vocab_tol = vocab_tol
        hidden, weight = head.hidden, head.weight
        self._d_hidden = torch.zeros_like(hidden) if needs[0] else None
        self._d_weight = None
        self._weight_dtype = torch.float32 if to_sink else weight.dtype
        if needs[1] and weight.dtype == torch.float32 and not to_sink:
            self._d_weight = torch.empty_like(weight)  # the sum is the result
        elif needs[1]:
            self._d_weight = claim("weight_gradient", tuple(weight.shape), torch.float32)
        self._d_bias = torch.zeros(head.vocab, dtype=torch.float32) if needs[2] else None
        self._live: list[torch.Tensor] = []
        self._count = 0
        self._largest = 0.0
        self._lengths: torch.Tensor | None = None
        self._started = False  # whether the weight's gradient holds anything yet
        dtype = head.products.slope_dtype
        width = odd_lines(head.vocab, dtype.itemsize)
        self._capacity = capacity(head.block, width * dtype.itemsize, len(hidden))
        self._slopes = buffer("slopes", (self._capacity, width), dtype)

    def add(
        self,
        start: int,
        by_logprob: torch.Tensor,
        by_entropy: torch.Tensor | None,
    ) -> None:
        """A block of rows, from `start` on, by the loss's derivatives by their log-probs and
        entropies."""
        stop = start + len(by_logprob)
        by_entropy = torch.zeros_like(by_logprob) if by_entropy is None else by_entropy
        by_logprob, by_entropy = (
            torch.where(sound, slope, 0)
            for sound, slope in zip(
                self.head.sound(start, stop), (by_logprob, by_entropy), strict=True
            )
        )
        index = ((by_logprob != 0) | (by_entropy != 0)).nonzero()[:, 0]
        if not len(index):
            return
        if self._count + len(index) > self._capacity:
            self._flush()
        self.head.slopes(start, index, by_logprob, by_entropy, self._count, self._slopes)
        self._live.append(index + start)
        self._count += len(index)
        self._largest = max(self._largest, float(by_logprob[index].abs().max()))

    def finish(self) -> Gradients:
        """Flush what is left and hand the sums over."""
        self._flush()
        bias = self.head.bias
        d_weight = d_bias = None
        if self._d_weight is not None:
            filled = self._d_weight if self._started else self._d_weight.zero_()
            d_weight = filled.to(self._weight_dtype)
        if self._d_bias is not None:
            d_bias = self._d_bias.to(bias.dtype)
        metrics = self._report.metrics() if self._vocab_tol else {}
        return Gradients(self._d_hidden, d_weight, d_bias, metrics)

    def _flush(self) -> None:
        if not self._count:
            return
        live = torch.cat(self._live)
        hidden = self.head.hidden[live]
        slopes = self._slopes[: padded_rows(self._count)]
        d_hidden = None
        if self._d_hidden is not None:
            d_hidden = buffer("hidden_gradient", tuple(hidden.shape), torch.float32)
        if not (self._vocab_tol and self._multiply_some(slopes, hidden, d_hidden)):
            self._multiply_all(slopes, hidden, d_hidden)
        if self._d_hidden is not None:
            self._d_hidden[live] = d_hidden.to(self._d_hidden.dtype)
        if self._d_bias is not None:
            chunk = slopes[: self._count, : self.head.vocab]
            self._d_bias += chunk.sum(0, dtype=torch.float32)
        self._live, self._count, self._largest = [], 0, 0.0

    def _multiply_all(
        self, slopes: torch.Tensor, hidden: torch.Tensor, d_hidden: torch.Tensor | None
    ) -> None:
        """Both products over all columns."""
        products, count = self.head.products, self._count
        if d_hidden is not None:
            products.d_hidden(slopes, count, None, d_hidden)
        if self._d_weight is not None:
            products.d_weight(slopes[:count], hidden, self._d_weight, self._started)
            self._started = True
        self._report.add(count, 1.0)

    def _multiply_some(
        self, slopes: torch.Tensor, hidden: torch.Tensor, d_hidden: torch.Tensor | None
    ) -> bool:
        """Both products over the columns that matter; False if that would not do."""
        products, count, weight = self.head.products, self._count, self.head.weight
        raw = bits(slopes)[:count]
        if self._lengths is None:
            self._lengths = vocabulary.weight_lengths(weight)
        lengths = self._lengths
        if self._vocab_tol == "auto":
            columns = vocabulary.choose_by_error(slopes[:count], hidden, lengths, products)
        else:
            least = self._vocab_tol * self._largest * float(self.head.scale)
            columns = vocabulary.choose(raw, hidden, self.head.vocab, least)
        if columns is None:
            return False
        width = odd_lines(len(columns.live), slopes.element_size())
        some = buffer("some_slopes", (len(slopes), width), slopes.dtype)
        vocabulary.gather(raw, columns.live, bits(some)[:count])
        d_weight = None
        if d_hidden is not None:
            products.d_hidden(some, count, columns.live, d_hidden)
        if self._d_weight is not None:
            shape = (len(columns.live), weight.shape[1])
            d_weight = buffer("some_weight_gradient", shape, torch.float32)
            products.d_weight(some[:count], hidden, d_weight, False)
        bound = vocabulary.error_bound(raw, columns, lengths, d_hidden, d_weight)
        if self._vocab_tol == "auto" and bound > ROUNDING:
            return False
        if d_weight is not None:
            if not self._started:
                self._d_weight.zero_()
            self._d_weight.index_add_(0, columns.live, d_weight)
            self._started = True
        self._report.add(count, len(columns.live) / self.head.vocab, columns, bound)
        return True


def head_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    by_logprob: torch.Tensor,
    by_entropy: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
    vocab_tol: float | str = 0.0,
    to_sink: bool = False,
) -> Gradients:
    """Gradients of hidden, weight and bias for known derivatives (N,) by log-prob and entropy.

    Logits are computed anew, of the rows that have a gradient only.
    """
    by_entropy = torch.zeros_like(by_logprob) if by_entropy is None else by_entropy
    live = ((by_logprob != 0) | (by_entropy != 0)).nonzero()[:, 0]
    by_logprob, by_entropy = by_logprob[live], by_entropy[live]
    head = Head(hidden[live], weight, bias, targets[live], temperature)
    gradient = HeadGradient(head, needs, vocab_tol, to_sink)
    for start, stop in head.blocks():
        gradient.add(start, by_logprob[start:stop], by_entropy[start:stop])
    found = gradient.finish()
    if found.hidden is None:
        return found
    d_hidden = torch.zeros_like(hidden)
    d_hidden[live] = found.hidden
    return found._replace(hidden=d_hidden)
