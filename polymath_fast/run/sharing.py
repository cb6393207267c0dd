"""A checkpoint of a run whose processes have the optimizer's state in parts: each writes its own
into the file that the leader made room in, so that none of them ever holds it all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from polymath_fast import checkpoint
from polymath_fast.errors import EngineError, UserError
from polymath_fast.folders import tensor_file
from polymath_fast.learner.optimizer_state import NAMES, OptimizerState
from polymath_fast.ranks import Ranks


def shared(ranks: Ranks, state: OptimizerState, step: int) -> checkpoint.Shared:
    """What the leader saves of everybody's `state`, while each other process calls `contribute`."""

    def fill(path: Path, starts: dict[str, int]) -> None:
        ranks.gather({"path": str(path.resolve()), "starts": starts})
        found = ranks.gather(_filled(path, starts, state, step))
        for of_rank in found:
            if "refused" in of_rank:
                raise UserError(of_rank["refused"])
            if "error" in of_rank:
                raise OSError(*of_rank["error"])
        written = sum(of_rank["elements"] for of_rank in found)
        assert written == len(NAMES) * state.elements, f"{written} of {state.elements} x 3 written"

    return checkpoint.Shared(NAMES, state.elements, fill)


def contribute(ranks: Ranks, state: OptimizerState, step: int) -> None:
    """Write this process's part of what the leader saves, which hears how that went."""
    told = ranks.gather(None)[0]
    ranks.gather(_filled(Path(told["path"]), told["starts"], state, step))


def require_alike(ranks: Ranks, *place: int) -> None:
    """Raise EngineError unless all processes are at one `place` of the run."""
    places = ranks.gather(list(place))
    odd = [rank for rank, found in enumerate(places) if found != places[0]]
    if odd:
        raise EngineError(f"process {odd[0]} has made other updates than process 0")


def _filled(path: Path, starts: dict[str, int], state: OptimizerState, step: int) -> dict[str, Any]:
    """The number of elements that were written, or why they could not be."""

    def sound(name: str) -> Iterator[tuple[int, Tensor]]:
        for first, piece in state.pieces(name):
            checkpoint.require_finite([(name, piece)], step)
            yield first, piece

    state.settle()
    try:
        written = [tensor_file.fill(path, starts[name], sound(name)) for name in NAMES]
    except UserError as error:
        return {"refused": str(error)}
    except OSError as error:
        return {"error": [error.errno, error.strerror]}
    return {"elements": sum(written)}
