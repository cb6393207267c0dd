"""What Triton's interpreter cannot go wrong in, and a GPU does: programs of one launch that meet in
memory, one that reads back what other threads of its own may not have stored yet, addresses outside
of the launch's arguments, and lanes that a load leaves out.

Programs of a launch run in any order, and threads of a program wait for each other at no access to
global memory. What kernels leave in `faults` is one word, of which any will do. A load without
`other` leaves in a register what was there; here it is the worst that could be.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from polymath_fast.kernels import faults
from polymath_fast.kernels.weight_sync import _triton as weight_sync
from polymath_fast.kernels.weight_sync.table import SegmentTable


class RaceError(AssertionError):
    """Two accesses whose order a GPU is free to choose."""


class BoundsError(AssertionError):
    """An access to memory that a kernel was not given."""


class _Access(NamedTuple):
    program: int
    addresses: np.ndarray
    """of elements"""
    values: np.ndarray | None
    """that were stored"""


class _Launch:
    def __init__(self, kernel: str, given: list[Any]) -> None:
        """`given`: arguments, and memory that they lead to."""
        self.kernel = kernel
        self.accesses: list[_Access] = []
        memory = sorted(_memory(each) for each in given)
        self._starts, ends = np.array(memory, np.int64).reshape(-1, 2).T
        self._ends = np.maximum.accumulate(ends)  # an earlier one may reach beyond a later one

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
        addresses = places[wanted].astype(np.int64)
        self._require_inside(addresses, pointers.get_element_ty().primitive_bitwidth // 8)
        self.accesses.append(_Access(x + (y << 20) + (z << 40), addresses, values))

    def _require_inside(self, addresses: np.ndarray, size: int) -> None:
        which = np.searchsorted(self._starts, addresses, side="right") - 1
        if (which < 0).any() or (addresses + size > self._ends[which]).any():
            raise BoundsError(f"{self.kernel}: an access outside of what it was given")

    def require_order(self) -> None:
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
            raise RaceError(f"{self.kernel}: two programs store different values in one place")
        self._require_order_of_loads(where, who, when)

    def _require_order_of_loads(self, where: Any, who: Any, when: Any) -> None:
        """Stores are sorted by place, program and time."""
        place, reader, moment = self._table(stored=False)
        first = np.searchsorted(where, place)
        met = first < len(where)
        met[met] = where[first[met]] == place[met]
        place, reader, moment, first = (each[met] for each in (place, reader, moment, first))
        last = np.searchsorted(where, place, side="right") - 1
        if ((who[first] != reader) | (who[last] != reader)).any():
            raise RaceError(f"{self.kernel}: a program reads what another one stores")
        if (when[first] < moment).any():
            raise RaceError(f"{self.kernel}: a program reads what it stored itself")

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


def _memory(given: Any) -> tuple[int, int]:
    """First address of a tensor and the one behind its last."""
    steps = zip(given.shape, given.stride(), strict=True)
    span = 1 + sum((size - 1) * step for size, step in steps) if given.numel() else 0
    return given.data_ptr(), given.data_ptr() + span * given.element_size()


def _tensors(given: Any) -> list[Any]:
    """That are arguments of a kernel, or that descriptors among them describe."""
    if isinstance(given, tuple | list):
        return [tensor for each in given for tensor in _tensors(each)]
    given = getattr(given, "base", given)
    return [given] if isinstance(given, torch.Tensor) else []


def _worst(pointers: Any) -> interpreter.TensorHandle:
    """NaN, or the largest number, for every element."""
    kind = pointers.get_element_ty()
    stored = interpreter._get_np_dtype(kind)
    if kind == tl.bfloat16:
        value = 0x7FC0
    elif stored.kind == "f":
        value = np.nan
    else:
        value = True if stored.kind == "b" else np.iinfo(stored).max
    return interpreter.TensorHandle(np.full(pointers.data.shape, value, stored), kind)


def watch() -> None:
    """From here on in this process, every launch that is interpreted is looked at."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    copy = weight_sync.weight_sync
    current: list[_Launch] = []
    reached: list[torch.Tensor] = []

    def noted_load(
        self: Any, pointers: Any, mask: Any, other: Any, *args: Any, **options: Any
    ) -> Any:
        current[-1].note(pointers, mask)
        other = _worst(pointers) if other is None else other
        return load(self, pointers, mask, other, *args, **options)

    def noted_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        current[-1].note(pointers, mask, value)
        return store(self, pointers, value, mask, *args)

    def noted_launch(self: Any, *args: Any, **options: Any) -> Any:
        given = _tensors([*args, *options.values()])
        current.append(_Launch(self.fn.__name__, given + reached))
        try:
            result = launch(self, *args, **options)
        finally:
            noted = current.pop()
        noted.require_order()
        return result

    def noted_copy(table: SegmentTable) -> None:
        """Its kernel reads addresses from the table."""
        reached[:] = [tensor for each in table.segments for tensor in (each.src, each.dst)]
        copy(table)
        reached.clear()

    weight_sync.weight_sync = noted_copy
    builder.create_masked_load, builder.create_masked_store = noted_load, noted_store
    executor.__call__ = noted_launch
