"""What AdamW remembers of each weight: an exact float32 value and two moments.

Float32 weights are that value themselves, and need no master beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymath_fast.errors import UserError
from polymath_fast.kernels.flat_adamw import halves
from polymath_fast.learner.offload import Offloaded
from polymath_fast.learner.state_file import StateFile

NAMES = ("master", "exp_avg", "exp_avg_sq")
_PIECE = 1 << 24  # elements converted at once: temporaries stay small beside the state


class OptimizerState:
    """Flat state beside the live weights, and its form in checkpoints.

    Args:
        live: (elements,) weights; their values are what the state begins with.
        spans: first and last + 1 element of each trained parameter, in the order of checkpoints.
        part: first and last + 1 element whose state is kept here.
        master_weights: "float32", or "remainder": the 16 bits by which bfloat16 weights differ
            from their float32 values.
        offload: of a GPU, keep the state in the host's memory; of a CPU, in a file in `folder`
            (the system's for temporary files when None). It then passes in chunks.

    Raises:
        UserError: a remainder of weights that are not bfloat16; a disk without room for the file.
    """

    def __init__(
        self,
        live: Tensor,
        spans: list[tuple[int, int]],
        part: tuple[int, int],
        master_weights: str,
        offload: bool,
        folder: Path | None = None,
    ):
        self._spans, self._part = spans, part
        self._live = live = live[slice(*part)]
        self.elements = sum(stop - start for start, stop in spans)
        self._remainder = master_weights == "remainder"
        if self._remainder and live.dtype != torch.bfloat16:
            raise UserError(
                f"--master-weights remainder completes bfloat16 weights, but the model's are "
                f"{live.dtype}; use --master-weights float32"
            )
        kinds = dict.fromkeys(NAMES, torch.float32)
        if self._remainder:
            kinds["master"] = torch.int16
        elif live.dtype == torch.float32:
            del kinds["master"]
        self._away: StateFile | Offloaded | None = None
        if offload and live.device.type == "cpu":
            self._away = StateFile(folder, kinds, live.numel())
            self._tensors = self._away.tensors
        else:
            where = {"device": "cpu", "pin_memory": True} if offload else {"device": live.device}
            self._tensors = {
                name: torch.zeros(live.numel(), dtype=kind, **where) for name, kind in kinds.items()
            }
            self._away = Offloaded(self._tensors, live.device) if offload else None
        if kinds.get("master") == torch.float32:
            self._tensors["master"].copy_(live)
            self.settle()

    def sweep(self, visit: Callable[[int, int, dict[str, Tensor]], None]) -> None:
        """visit(start, stop, {name: state of elements [start, stop) on the weights' device}), for
        all elements of the part."""
        offset = self._part[0]

        def complete(start: int, stop: int, tensors: dict[str, Tensor]) -> None:
            master = {"master": self._live[start:stop]}
            visit(offset + start, offset + stop, master | tensors)

        if self._away:
            self._away.sweep(complete)
        else:
            complete(0, self._live.numel(), self._tensors)

    def gather(self) -> dict[str, Tensor]:
        """(parameters,) float32 for each of `NAMES`; views of the state where it has that form.
        The part must be the whole."""
        assert all(self._part[0] <= start and stop <= self._part[1] for start, stop in self._spans)
        self.settle()
        return {name: self._gathered(name) for name in NAMES}

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """What is kept here of a checkpoint's tensor `name`: its first element there, and (n,)
        float32 on the CPU. `settle` comes before."""
        state = self._tensors.get(name, self._live)
        for here, there in self._pieces():
            piece = state[here]
            if piece.dtype == torch.int16:
                piece = halves.join(self._live[here].to(piece.device), piece)
            yield there.start, piece.cpu()
            self.settle()

    def settle(self) -> None:
        """Wait until what is off-loaded is where it belongs."""
        if self._away:
            self._away.settle()

    def scatter(self, tensors: Mapping[str, Any]) -> None:
        """Take over the part of what `gather` gave, here or elsewhere, of tensors or what gives
        them by slices; the live weights follow the master."""
        self.settle()
        for name in NAMES:
            state = self._tensors.get(name)
            for here, there in self._pieces():
                value = tensors[name][there]
                if name == "master":
                    value = self._set_live(here, value)
                if state is not None:
                    state[here] = value.to(state.device)
                self.settle()

    def _set_live(self, here: slice, master: Tensor) -> Tensor:
        """Round `master` into the live weights; returns what the state has to hold of it."""
        if self._remainder:
            live, lower = halves.split(master)
        else:
            live, lower = halves.rounded(master, self._live.dtype), master
        self._live[here] = live.to(self._live.device)
        return lower

    def _gathered(self, name: str) -> Tensor:
        state = self._tensors.get(name, self._live)
        ends = [0, *(stop for _, stop in self._spans)]
        in_order = ends == [*(start for start, _ in self._spans), state.numel()]
        if in_order and state.dtype == torch.float32:
            return state
        found = torch.empty(self.elements)
        for first, piece in self.pieces(name):
            found[first : first + len(piece)] = piece
        return found

    def _pieces(self) -> Iterator[tuple[slice, slice]]:
        """Elements of the part, and the same ones in a checkpoint."""
        begin, end = self._part
        offset = 0
        for start, stop in self._spans:
            for first in range(max(start, begin), min(stop, end), _PIECE):
                size = min(_PIECE, min(stop, end) - first)
                here, there = first - begin, offset + first - start
                yield slice(here, here + size), slice(there, there + size)
            offset += stop - start
