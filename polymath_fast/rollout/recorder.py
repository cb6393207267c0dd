"""Which completions of a wave the sampler's tape keeps, see `rollout.tape`.

All of them begin to be recorded. When the tape is full, the last one that is still growing gives
its rows up, then the one before it: what is left when the wave is over fills the tape, however long
completions turned out to be and however much they had in common.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from polymath_fast.kernels.cpu.recorded_head import RecordedPredictions, Recording
from polymath_fast.rollout.row_pool import Rows
from polymath_fast.rollout.tape import Activations, Recorded, Tape, uninitialised
from polymath_fast.rollout.tape_room import DecoderSizes

_NOWHERE = np.empty(0, np.int64)


class Recorder:
    """The rows of one wave of `completions` that draw at most `tokens` each."""

    def __init__(self, tape: Tape, completions: int, tokens: int, temperature: float = 1.0):
        count = completions if tape.inputs.left else 0
        self._tape = tape
        self._temperature = temperature
        self._recorded = np.ones(count, bool)
        self._inputs = np.full((count, tokens), -1)  # rows of activations, by completion and place
        self._draws = np.full((count, tokens), -1)  # rows of exponentials
        self._found = uninitialised(torch.float64, count * tokens, 4)
        self._followed = _NOWHERE, _NOWHERE

    def open(self, sizes: DecoderSizes) -> Activations:
        """A decoder of these sizes is about to begin: where it writes."""
        if self._recorded.any():
            self._tape.open(sizes)
        return self._tape.activations or Activations.empty(sizes, 0)

    def follow(self, completions: Tensor, branches: Tensor) -> None:
        """From here on the decoder's row of each of the ascending `completions` (C,) is that of
        `branches` (C,)."""
        self._followed = completions.numpy(), branches.numpy()

    def drop(self, completion: int) -> None:
        """Nobody will learn from this one: others may have its rows."""
        if completion < len(self._recorded) and self._recorded[completion]:
            self._recorded[completion] = False
            for pool, held in (
                (self._tape.inputs, self._inputs),
                (self._tape.draws, self._draws),
            ):
                rows = held[completion]
                pool.give_back(rows[rows >= 0])

    def begin(self, branches: Tensor, places: Tensor) -> np.ndarray:
        """Rows (R,) of the activations for the next tokens (R,), at `places` of `branches`, -1 for
        those that are not recorded; (0,) if none is."""
        if not self._recorded.any():
            return _NOWHERE
        completions, followed = self._followed
        which, token = (followed[:, None] == branches.numpy()).nonzero()
        reading = completions[which], places.numpy()[token], token
        return self._rows(self._tape.inputs, self._inputs, *reading, len(branches))

    def predict(
        self, completions: Tensor, places: Tensor, branches: Tensor, count: int
    ) -> Recording | None:
        """Where to keep what tokens (C,), at `places` of `completions`, are drawn from, rows
        `branches` (C,) of `count` rows of logits; None when nothing is kept of any."""
        tape = self._tape
        if tape.exponentials is None or not self._recorded.any():
            return None
        drawing = completions.numpy(), places.numpy(), branches.numpy()
        rows = self._rows(tape.draws, self._draws, *drawing, count)
        kept = torch.from_numpy(self._recorded[drawing[0]])
        where = torch.where(kept, self._place(completions, places), -1)
        return Recording(tape.exponentials, torch.from_numpy(rows), where, self._found)

    def recorded(self, completion: int, length: int, weight_version: int) -> Recorded | None:
        """Of a completion of that many tokens, which has ended; None if it is not recorded."""
        tape = self._tape
        if tape.activations is None or completion >= len(self._recorded):
            return None
        if not length or not self._recorded[completion]:
            return None
        rows = torch.from_numpy(self._inputs[completion, : length - 1].copy())
        predictions = None
        if tape.exponentials is not None:
            begin = self._place(completion, 0)
            drawn = torch.from_numpy(self._draws[completion, :length].copy())
            found = self._found[begin : begin + length]
            kept = tape.exponentials, drawn, found
            predictions = RecordedPredictions(*kept, self._temperature)
        return Recorded(tape.activations, rows, weight_version, predictions)

    def _rows(
        self,
        pool: Rows,
        held: np.ndarray,
        completions: np.ndarray,
        places: np.ndarray,
        tokens: np.ndarray,
        count: int,
    ) -> np.ndarray:
        """Rows (count,) of `pool`, -1 for those without one, for tokens (n,) of the decoder's rows,
        which are those of `completions` (n,), all of them still growing, at `places` (n,)."""
        rows = np.full(count, -1)
        while True:
            mine = self._recorded[completions]
            if not mine.any():
                return rows
            which, member = np.unique(tokens[mine], return_inverse=True)
            if len(which) <= pool.left:
                break
            self.drop(int(completions[mine].max()))
        at = completions[mine], places[mine]
        before = held[at]  # of a draft that was wrong
        pool.give_back(before[before >= 0])
        rows[which] = pool.take(np.bincount(member))
        held[at] = rows[tokens[mine]]
        return rows

    def _place(self, completions: Tensor | int, places: Tensor | int) -> Tensor | int:
        """Rows of what was found of tokens at `places` of `completions`."""
        return completions * self._inputs.shape[1] + places
