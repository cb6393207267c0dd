"""What the sampler's forward passes computed, kept until the learner has gone back through them.

A policy that samples and learns with the same weights computes every token of a completion twice:
once to draw the next one, once to differentiate. Here the first time is the only one. The sampler
keeps what a backward pass needs in rows of the tape, token by token; a completion knows its rows,
see `Recorded`. Completions that are still on one branch, see `rollout.branches`, share them. Who
gets rows while they last is up to `rollout.recorder`.

Legend: L layers, H hidden, Hq / Hkv query and key heads, D head size, I width of the MLP.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from polymath_fast import memory
from polymath_fast.errors import UserError
from polymath_fast.kernels.cpu import tiles
from polymath_fast.kernels.cpu.recorded_head import RecordedPredictions
from polymath_fast.rollout.row_pool import Rows
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
            uninitialised(dtype, layers + 1, rows, sizes.hidden),
            uninitialised(dtype, layers, rows, heads + 2 * sizes.key_heads, sizes.head_dim),
            uninitialised(dtype, layers, rows, heads * sizes.head_dim),
            uninitialised(torch.float32, layers, rows, heads),
            uninitialised(dtype, layers, rows, sizes.hidden),
            uninitialised(dtype, layers, sizes.panels, rows, 2 * tiles.COLUMNS),
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
        self.inputs, self.draws = Rows(0), Rows(0)
        """rows of `activations` and of `exponentials`; none between steps"""
        self.activations: Activations | None = None
        self.exponentials: Tensor | None = None  # (rows, V + padding), see `Recording`
        self._keeps_predictions = predictions

    def start_step(self) -> None:
        """Forget everything; completions sampled from here on are recorded while there is room."""
        self.inputs, self.draws = Rows(self.rows), Rows(self.rows)

    def end_step(self) -> None:
        """Record nothing until the next step."""
        self.inputs, self.draws = Rows(0), Rows(0)

    def open(self, sizes: DecoderSizes) -> None:
        """Make room, if there is none yet. Raises UserError where the system has none."""
        if self.activations is not None:
            return
        try:
            self.activations = Activations.empty(sizes, self.rows)
            if self._keeps_predictions:
                self.exponentials = uninitialised(sizes.dtype, self.rows, sizes.vocab_width)
        except RuntimeError as error:  # torch has no class of its own for it on a CPU
            row_bytes = sizes.layer_bytes + sizes.head_bytes * self._keeps_predictions
            gib = self.rows * row_bytes / memory.GIB
            raise UserError(
                f"the system has no {gib:.1f} GiB for the tape of {self.rows} tokens; go on with "
                f"--tape-gib {gib / 2:.1g}, or 0 for none"
            ) from error


def uninitialised(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor that the sampler may write and the learner read."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype)
