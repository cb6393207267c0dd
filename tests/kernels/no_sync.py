"""A mode in which whatever makes the host wait for a GPU is an error, on any device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_WAITING = {
    "_local_scalar_dense",  # item, bool, int, float, tolist, indexing by a 0-d tensor
    "nonzero",
    "masked_select",
    "equal",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "lift_fresh",  # torch.tensor(...): copied from memory that a GPU cannot read by itself
}


_READS = {name: getattr(torch.Tensor, name) for name in ("tolist", "numpy", "cpu")}


class NoSync(TorchDispatchMode):
    """Raises AssertionError at an operation that fetches from the device, or waits for a copy."""

    def __enter__(self) -> NoSync:
        # on CPU tensors these read memory without an operation
        self._patch = pytest.MonkeyPatch()
        for name in _READS:
            self._patch.setattr(torch.Tensor, name, _refuse)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patch.undo()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        kwargs = kwargs or {}
        waits = name in _WAITING
        if name in ("index", "index_put", "index_put_"):
            masks = [i for i in args[1] if i is not None]
            waits = any(i.dtype in (torch.bool, torch.uint8) for i in masks)
        elif name == "repeat_interleave":
            waits = kwargs.get("output_size") is None and "self_int" not in func.name()
        elif name in ("_to_copy", "copy_"):
            devices = {t.device for t in args if isinstance(t, torch.Tensor)}
            waits = len(devices | {kwargs.get("device") or args[0].device}) > 1
        if waits:
            raise AssertionError(f"{func.name()} makes the host wait for a GPU")
        return func(*args, **kwargs)


def _refuse(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    raise AssertionError("reading a tensor makes the host wait for a GPU")


def outside(function: Any) -> Any:
    """`function`, a kernel launch of Triton's interpreter say, seen by no mode."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes(), pytest.MonkeyPatch.context() as patch:
            for name, method in _READS.items():
                patch.setattr(torch.Tensor, name, method)
            return function(*args, **kwargs)

    return call
