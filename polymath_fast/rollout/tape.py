"""What the sampler's forward passes computed, kept until the learner has gone back through them.

A policy that samples and learns with the same weights computes every token of a completion twice:
once to draw the next one, once to differentiate. Here the first time is the only one. The sampler
keeps what a backward pass needs in rows of the tape, token by token; a completion knows its rows,
see `Recorded`. Completions that are still on one branch, see `rollout.branches`, share them.

Legend: L layers, H hidden, Hq / Hkv query and key heads, D head size, I width of the MLP.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from polymath_fast import memory
from polymath_fast.errors import UserError
from polymath_fast.kernels.cpu import tiles
from polymath_fast.kernels.cpu.recorded_head import RecordedPredictions, Recording
from polymath_fast.rollout.tape_room import DecoderSizes


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
        self.used = self.drawn = 0  # rows of `activations` and of `exponentials`
        self.activations: Activations | None = None
        self.exponentials: Tensor | None = None  # (rows, V + padding), see `Recording`
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
                self.exponentials = _empty(sizes.dtype, self.rows, sizes.vocab_width)
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
        self._found = _empty(torch.float64, count * tokens, 4)
        self._completions = self._branches = torch.empty(0, dtype=torch.int64)

    def open(self, sizes: DecoderSizes) -> Activations:
        """A decoder of these sizes is about to begin: where it writes."""
        if self.count:
            self._tape.open(sizes)
        return self._tape.activations or Activations.empty(sizes, 0)

    def follow(self, completions: Tensor, branches: Tensor) -> None:
        """From here on the decoder's row of each of the ascending `completions` (C,) is that of
        `branches` (C,), which are in the order of their first completions."""
        self._completions, self._branches = completions, branches

    def begin(self, branches: Tensor, places: Tensor) -> tuple[int, int]:
        """How many of the next tokens (R,), at `places` of ascending `branches`, are recorded,
        which are the first of them, and the row of the activations for the first one."""
        mine = self._completions < self.count
        completions, followed = self._completions[mine], self._branches[mine]
        count = int((branches < _end(followed)).sum())
        first = self._tape.used
        if not self._fits(first + count):
            return 0, first
        self._tape.used += count
        which, token = (followed[:, None] == branches[:count]).nonzero(as_tuple=True)
        self._rows[completions[which], places[token]] = first + token
        return count, first

    def predict(self, completions: Tensor, places: Tensor, branches: Tensor) -> Recording | None:
        """Where to keep what tokens (C,), at `places` of ascending `completions`, are drawn from,
        rows `branches` (C,) of logits; None when no predictions are kept."""
        tape = self._tape
        if tape.exponentials is None:
            return None
        mine = completions < self.count
        count, first = _end(branches[mine]), tape.drawn
        if not self._fits(first + count):
            return None
        tape.drawn += count
        self._drawn[completions[mine], places[mine]] = first + branches[mine]
        rows = torch.where(mine, self._place(completions, places), -1)
        return Recording(tape.exponentials, count, first, rows, self._found)

    def recorded(self, completion: int, length: int, weight_version: int) -> Recorded | None:
        """Of a completion of that many tokens; None unless all of its inputs were recorded."""
        if completion >= len(self._rows) or not length or self._tape.activations is None:
            return None
        rows, drawn = self._rows[completion, : length - 1], self._drawn[completion, :length]
        kept = self._tape.exponentials
        if bool((rows < 0).any()) or (kept is not None and bool((drawn < 0).any())):
            return None
        predictions = None
        if kept is not None:
            begin = self._place(completion, 0)
            found = self._found[begin : begin + length]
            predictions = RecordedPredictions(kept, drawn.clone(), found, self._temperature)
        return Recorded(self._tape.activations, rows.clone(), weight_version, predictions)

    def _place(self, completions: Tensor | int, places: Tensor | int) -> Tensor | int:
        """Rows of what was found of tokens at `places` of `completions`."""
        return completions * self._rows.shape[1] + places

    def _fits(self, rows: int) -> bool:
        """Whether the tape has so many; when it has not, nothing is recorded ever again."""
        if rows > self._tape.rows:
            self.count = 0
        return rows <= self._tape.rows


def _end(branches: Tensor) -> int:
    """How many branches there are before and among those."""
    return int(branches.max()) + 1 if len(branches) else 0


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    with torch.inference_mode(False):  # the sampler writes, the learner reads
        return torch.empty(shape, dtype=dtype)
