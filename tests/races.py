"""What Triton's interpreter cannot go wrong in, and a GPU does: programs of one launch that meet in
memory, and one that reads back what other threads of its own may not have stored yet.

Programs of a launch run in any order, and threads of a program wait for each other at no access to
global memory. What kernels leave in `faults` is one word, of which any will do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from triton.runtime import interpreter

from polymath_fast.kernels import faults


class RaceError(AssertionError):
    """Two accesses whose order a GPU is free to choose."""


class _Access(NamedTuple):
    program: int
    addresses: np.ndarray
    """of elements"""
    values: np.ndarray | None
    """that were stored"""


class _Launch:
    def __init__(self) -> None:
        self.accesses: list[_Access] = []

    def note(self, pointers: Any, mask: Any, value: Any = None) -> None:
        """An access of the program that runs, in order."""
        x, y, z = interpreter.interpreter_builder.grid_idx
        places = pointers.data
        if value is not None and places.size == 1 and _is_note(places.item()):
            return
        wanted = np.broadcast_to(mask.data, places.shape)
        values = None
        if value is not None:
            values = np.broadcast_to(value.data, places.shape)[wanted]
        program = x + (y << 20) + (z << 40)
        self.accesses.append(_Access(program, places[wanted].astype(np.int64), values))

    def require_order(self, kernel: str) -> None:
        """Raise RaceError where the result depends on it."""
        stores = [each for each in self.accesses if each.values is not None]
        if not stores:
            return
        where, who, when = self._table(stored=True)
        what = np.concatenate([each.values.astype(np.float64) for each in stores])
        order = np.lexsort((when, who, where))
        where, who, when, what = (column[order] for column in (where, who, when, what))
        same = where[1:] == where[:-1]
        unlike = (what[1:] != what[:-1]) & ~(np.isnan(what[1:]) & np.isnan(what[:-1]))
        if (same & (who[1:] != who[:-1]) & unlike).any():
            raise RaceError(f"{kernel}: two programs store different values in one place")
        self._require_order_of_loads(kernel, where, who, when)

    def _require_order_of_loads(self, kernel: str, where: Any, who: Any, when: Any) -> None:
        """Stores are sorted by place, program and time."""
        place, reader, moment = self._table(stored=False)
        first = np.searchsorted(where, place)
        met = first < len(where)
        met[met] = where[first[met]] == place[met]
        place, reader, moment, first = (each[met] for each in (place, reader, moment, first))
        last = np.searchsorted(where, place, side="right") - 1
        if ((who[first] != reader) | (who[last] != reader)).any():
            raise RaceError(f"{kernel}: a program reads what another one stores")
        if (when[first] < moment).any():
            raise RaceError(f"{kernel}: a program reads what it stored itself")

    def _table(self, stored: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Address, program and time of each element."""
        some = [
            (when, each)
            for when, each in enumerate(self.accesses)
            if (each.values is not None) == stored
        ]
        counts = [len(each.addresses) for _, each in some]
        where = np.concatenate([each.addresses for _, each in some] or [np.empty(0, np.int64)])
        who = np.repeat(np.array([each.program for _, each in some], np.int64), counts)
        return where, who, np.repeat(np.arange(len(self.accesses))[[w for w, _ in some]], counts)


def _is_note(address: int) -> bool:
    return any(0 <= address - note.data_ptr() < note.nbytes for note in faults._notes.values())


def watch() -> None:
    """From here on in this process, every launch that is interpreted is looked at."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    current: list[_Launch] = []

    def noted_load(self: Any, pointers: Any, mask: Any, *args: Any, **options: Any) -> Any:
        current[-1].note(pointers, mask)
        return load(self, pointers, mask, *args, **options)

    def noted_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        current[-1].note(pointers, mask, value)
        return store(self, pointers, value, mask, *args)

    def noted_launch(self: Any, *args: Any, **options: Any) -> Any:
        current.append(_Launch())
        try:
            result = launch(self, *args, **options)
        finally:
            noted = current.pop()
        noted.require_order(self.fn.__name__)
        return result

    builder.create_masked_load, builder.create_masked_store = noted_load, noted_store
    executor.__call__ = noted_launch
