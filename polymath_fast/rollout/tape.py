"""What the sampler's forward passes computed, kept until the learner has gone back through them.

A policy that samples and learns with the same weights computes every token of a completion twice:
once to draw the next one, once to differentiate. Here the first time is the only one. The sampler
keeps what a backward pass needs in rows of the tape, token by token; a completion knows its rows,
see `Recorded`.

Legend: L layers, H hidden, Hq / Hkv query and key heads, D head size, I width of the MLP.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from polymath_fast import memory
from polymath_fast.errors import UserError
from polymath_fast.kernels.cpu import tiles
from polymath_fast.kernels.cpu.recorded_head import Predictions, RecordedPredictions, Recording
from polymath_fast.rollout.tape_room import STATISTICS, DecoderSizes


class Activations(NamedTuple):
    """What layers compute on rows of tokens; see `kernels.cpu.decode.step`."""

    hidden: Tensor
    """(L + 1, rows, H) the input of each layer, then what the last norm reads"""
    stacked: Tensor
    """(L, rows, Hq + 2 Hkv, D) queries, keys and values before norm and rotation"""
    attended: Tensor
    """(L, rows, Hq D)"""
    lse: Tensor
    """(L, rows, Hq) float32"""
    between: Tensor
    """(L, rows, H) after attention"""
    gate_up: Tensor
    """(L, panels, rows, 96), of each 48 columns those of the gate, then those of up"""

    @classmethod
    def empty(cls, sizes: DecoderSizes, rows: int) -> Activations:
        """Uninitialised; memory counts from the first write to each row on."""
        layers, heads, dtype = sizes.layers, sizes.heads, sizes.dtype
        return cls(
            _empty(dtype, layers + 1, rows, sizes.hidden),
            _empty(dtype, layers, rows, heads + 2 * sizes.key_heads, sizes.head_dim),
            _empty(dtype, layers, rows, heads * sizes.head_dim),
            _empty(torch.float32, layers, rows, heads),
            _empty(dtype, layers, rows, sizes.hidden),
            _empty(dtype, layers, sizes.panels, rows, 2 * tiles.COLUMNS),
        )


class Recorded(NamedTuple):
    """Where the forward pass of one completion lies."""

    activations: Activations
    rows: Tensor
    """(length - 1,) int64, of each token but the last one, which is never an input"""
    weight_version: int
    """of the weights that made it; others have no use for it"""
    predictions: RecordedPredictions | None
    """of each of its tokens, if they are kept"""


class Tape:
    """Room for `rows` tokens, which is allocated when the first wave begins."""

    def __init__(self, rows: int = 0, *, predictions: bool = True):
        """`predictions`: whether the softmaxes that tokens are drawn from are kept, too."""
        self.rows = rows
        self.used = self.drawn = 0  # rows of `activations` and of `predictions`
        self.activations: Activations | None = None
        self.predictions: Predictions | None = None
        self._keeps_predictions = predictions
        self._on = False

    def start_step(self) -> None:
        """Forget everything; completions sampled from here on are recorded while there is room."""
        self.used, self.drawn, self._on = 0, 0, True

    def end_step(self) -> None:
        """Record nothing until the next step."""
        self._on = False

    def claim(self, completions: int, tokens: int, temperature: float = 1.0) -> Recorder:
        """For a wave of completions of at most so many tokens, drawn at that temperature: the
        first ones that surely fit."""
        left = self.rows - max(self.used, self.drawn) if self._on else 0
        fitting = left // max(1, tokens)
        return Recorder(self, min(completions, fitting), tokens, temperature)

    def open(self, sizes: DecoderSizes) -> None:
        """Make room, if there is none yet. Raises UserError where the system has none."""
        if self.activations is not None:
            return
        try:
            self.activations = Activations.empty(sizes, self.rows)
            if self._keeps_predictions:
                self.predictions = Predictions(
                    _empty(sizes.dtype, self.rows, sizes.vocab_width),
                    _empty(torch.float64, self.rows, STATISTICS),
                )
        except RuntimeError as error:  # torch has no class of its own for it on a CPU
            row_bytes = sizes.layer_bytes + sizes.head_bytes * self._keeps_predictions
            gib = self.rows * row_bytes / memory.GIB
            raise UserError(
                f"the system has no {gib:.1f} GiB for the tape of {self.rows} tokens; go on with "
                f"--tape-gib {gib / 2:.1g}, or 0 for none"
            ) from error


class Recorder:
    """The rows of one wave of completions: the first `count` of them are recorded."""

    def __init__(self, tape: Tape, count: int, tokens: int, temperature: float):
        self.count = count
        self._tape = tape
        self._temperature = temperature
        self._rows = torch.full((count, tokens), -1)
        self._drawn = torch.full((count, tokens), -1)

    def open(self, sizes: DecoderSizes) -> Activations:
        """A decoder of these sizes is about to begin: where it writes."""
        if self.count:
            self._tape.open(sizes)
        return self._tape.activations or Activations.empty(sizes, 0)

    def begin(self, completions: Tensor, places: Tensor) -> tuple[int, int]:
        """How many of the next tokens (R,), at `places` of ascending `completions`, are recorded,
        which are the first of them, and the row of the activations for the first one."""
        tape = self._tape
        count = self._recorded(completions, tape.used)
        tape.used += count
        first = tape.used - count
        self._rows[completions[:count], places[:count]] = torch.arange(first, tape.used)
        return count, first

    def predict(self, completions: Tensor, places: Tensor) -> Recording | None:
        """As `begin`, where tokens (R,) are drawn; None when no predictions are kept."""
        tape = self._tape
        if tape.predictions is None:
            return None
        count = self._recorded(completions, tape.drawn)
        tape.drawn += count
        first = tape.drawn - count
        self._drawn[completions[:count], places[:count]] = torch.arange(first, tape.drawn)
        return Recording(tape.predictions, count, first)

    def recorded(self, completion: int, length: int, weight_version: int) -> Recorded | None:
        """Of a completion of that many tokens; None unless all of its inputs were recorded."""
        if completion >= len(self._rows) or not length or self._tape.activations is None:
            return None
        rows, drawn = self._rows[completion, : length - 1], self._drawn[completion, :length]
        kept = self._tape.predictions
        if bool((rows < 0).any()) or (kept is not None and bool((drawn < 0).any())):
            return None
        predictions = None
        if kept is not None:
            predictions = RecordedPredictions(kept, drawn.clone(), self._temperature)
        return Recorded(self._tape.activations, rows.clone(), weight_version, predictions)

    def _recorded(self, completions: Tensor, used: int) -> int:
        """How many of `completions` are recorded; when there are no rows left, none ever again."""
        count = int((completions < self.count).sum())
        if used + count > self._tape.rows:
            self.count = count = 0
        return count


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    with torch.inference_mode(False):  # the sampler writes, the learner reads
        return torch.empty(shape, dtype=dtype)
