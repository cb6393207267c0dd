"""Which part of which learner tensor goes where in an engine, as the engine's own loader says.

vLLM knows how it stacks and splits the weights of each architecture: its `load_weights` does it. It
is run once on tensors without memory; every `copy_` it makes into a parameter is noted as two
strided views instead of being carried out. So nothing here names a layer or an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polymath_fast.errors import UserError
from polymath_fast.kernels import SegmentTable

Loader = Callable[[Iterable[tuple[str, Tensor]]], object]
_RELOAD = "--weight-sync reload works with any engine"
_CONSTANT = (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default)


@dataclass(frozen=True)
class View:
    """A strided part of a named tensor; offset (from its first element) and strides in elements."""

    name: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """That part of `tensor`."""
        start = tensor.storage_offset() + self.offset
        return tensor.detach().as_strided(self.shape, self.strides, start)

    def intervals(self) -> np.ndarray:
        """(n, 2) int64: first element and the one past the last of each contiguous piece."""
        length, starts = 1, np.array([self.offset], np.int64)
        for size, stride in reversed(list(zip(self.shape, self.strides, strict=True))):
            if size == 1:
                continue
            if stride == length and len(starts) == 1:
                length *= size
            else:
                starts = (np.arange(size, dtype=np.int64)[:, None] * stride + starts).ravel()
        return np.stack([starts, starts + length], 1)[: self.numel and len(starts)]

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class WeightPlan:
    """Every copy that loading the model makes: (source view, target view) of equal shapes."""

    moves: tuple[tuple[View, View], ...]

    def table(self, sources: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> SegmentTable:
        """The plan for tensors that have memory, those it was recorded for or others like them."""
        return SegmentTable(
            [source.of(sources[source.name]) for source, _ in self.moves],
            [target.of(targets[target.name]) for _, target in self.moves],
        )


def record(
    load_weights: Loader,
    sources: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    *,
    rank: int = 0,
    world_size: int = 1,
) -> WeightPlan:
    """Run `load_weights` on stand-ins for `sources` and note what it copies into `targets`.

    Args:
        load_weights: the engine model's own; constants that it writes (padding) are written.
        sources: Hugging Face name -> learner tensor; a tied tensor may come under several names.
        targets: name -> every parameter of the engine's model.
        rank, world_size: the engine's place among those that split the model between them.

    Raises:
        UserError: the loader refuses a tensor, does more than copy it, leaves one out, or writes
            part of a parameter twice or never. The message names the tensor.
    """
    for name, target in targets.items():
        if target.numel() == 0:
            raise UserError(
                f"the engine keeps {name} in a layout of its own, so nothing can be copied into "
                f"it; {_RELOAD}"
            )
    recorder = _Recorder(sources, targets)
    with torch.no_grad(), recorder:
        try:
            load_weights(recorder.stand_ins())
        except UserError:
            raise
        # whatever a loader of any architecture may raise on a tensor that does not fit
        except Exception as error:
            raise UserError(
                f"the engine's loader refused {recorder.last}: {_words(error)}; learner and engine "
                f"must be the same model, or {_RELOAD}"
            ) from error
    for name, target in targets.items():
        _check_written(name, target.numel(), recorder)
    _check_read(sources, recorder, rank, world_size)
    return WeightPlan(tuple(move for move in recorder.moves if move[0].numel))


class _Recorder(TorchDispatchMode):
    """Notes copies from stand-ins into targets; other work on a stand-in must be a view of it."""

    def __init__(self, sources: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.moves: list[tuple[View, View]] = []
        self.constants: list[View] = []
        self.last = "a tensor"
        # The engine's dtype: some loaders warn about each tensor of another one. Moves count
        # elements, so the learner's own does not matter.
        like = {"dtype": next((t.dtype for t in targets.values()), None), "device": "meta"}
        self._stand_ins = {
            name: torch.empty_strided(t.shape, t.stride(), **like) for name, t in sources.items()
        }
        self._source_of = {_storage(t): name for name, t in self._stand_ins.items()}
        self._targets: dict[int, list[tuple[int, int, str]]] = {}
        for name, target in targets.items():
            start = target.storage_offset()
            span = (start, start + _extent(target), name)
            self._targets.setdefault(_storage(target), []).append(span)

    def stand_ins(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor without memory) as a loader wants them."""
        for name, stand_in in self._stand_ins.items():
            self.last = f"{name} {tuple(stand_in.shape)}"
            yield name, stand_in

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default and self._name(args[1]) is not None:
            self._note(args[1], args[0])
            return args[0]
        out = func(*args, **kwargs)
        if func in _CONSTANT or func is torch.ops.aten.copy_.default:
            target = self._target(args[0])
            if target is not None:
                self.constants.append(target)
        self._check_view(func, (args, kwargs), out)
        return out

    def _note(self, source: Tensor, target: Tensor) -> None:
        name, place = self._name(source), self._target(target)
        if place is None:
            raise UserError(
                f"the engine's loader copies {name} to memory that is no parameter; {_RELOAD}"
            )
        if source.shape != target.shape:
            raise UserError(
                f"{name} has a part of shape {tuple(source.shape)} where the engine's {place.name} "
                f"wants {tuple(target.shape)}; learner and engine must be the same model"
            )
        part = View(name, source.storage_offset(), tuple(source.shape), source.stride())
        self.moves.append((part, place))

    def _check_view(self, func: Any, inputs: Any, out: Any) -> None:
        names = {self._name(t) for t in tree_leaves(inputs) if isinstance(t, Tensor)} - {None}
        for result in tree_leaves(out) if names else ():
            if isinstance(result, Tensor) and self._name(result) is None:
                raise UserError(
                    f"the engine's loader does more with {min(names)} than copy it ({func}); "
                    f"{_RELOAD}"
                )

    def _name(self, tensor: Tensor) -> str | None:
        return self._source_of.get(_storage(tensor))

    def _target(self, tensor: Tensor) -> View | None:
        offset = tensor.storage_offset()
        for start, end, name in self._targets.get(_storage(tensor), ()):
            if start <= offset < end or tensor.numel() == 0:
                return View(name, offset - start, tuple(tensor.shape), tensor.stride())
        return None


def _check_read(
    sources: Mapping[str, Tensor], recorder: _Recorder, rank: int, world_size: int
) -> None:
    """Every source as a whole; of several ranks, the first reads its start and the last its end."""
    parts: dict[str, list[View]] = {}
    for source, _ in recorder.moves:
        parts.setdefault(source.name, []).append(source)
    held = {(sources[name].data_ptr(), sources[name].shape) for name in parts}
    for name, source in sources.items():
        if name not in parts and (source.data_ptr(), source.shape) not in held:
            raise UserError(
                f"the engine has no place for {name}; where that is an LM head, the engine's is "
                "tied to the embedding and the learner's is not: set tie_word_embeddings in "
                "config.json to what the weights are"
            )
    # vLLM narrows a tensor to what a layer holds and does not look at what is left over.
    for name, views in parts.items():
        count, whole = sum(view.numel for view in views), sources[name].numel()
        read = _sorted(views)
        cut = world_size == 1 and count != whole
        cut |= count > 0 and rank == 0 and read[0, 0] != 0
        cut |= count > 0 and rank == world_size - 1 and read[:, 1].max() != _extent(sources[name])
        if cut:
            raise UserError(
                f"the engine takes {count} of the {whole} elements of {name} "
                f"{tuple(sources[name].shape)}; learner and engine must be the same model"
            )


def _check_written(name: str, count: int, recorder: _Recorder) -> None:
    """Every element of a target by one copy, or by a constant alone."""
    copies = [target for _, target in recorder.moves if target.name == name]
    written = _sorted(copies)
    if len(written) and (written[1:, 0] < written[:-1, 1]).any():
        writers = sorted({s.name for s, t in recorder.moves if t.name == name})
        raise UserError(
            f"the engine's {name} is written more than once, from {', '.join(writers)}; {_RELOAD}"
        )
    ends = np.concatenate([[0], written[:, 1]])
    starts = np.concatenate([written[:, 0], [count]])
    constants = _sorted(view for view in recorder.constants if view.name == name)
    for first, last in zip(ends.tolist(), starts.tolist(), strict=True):
        for start, end in constants.tolist():
            if start <= first < end:
                first = end
        if first < last:
            raise UserError(
                f"no learner tensor is loaded into the engine's {name} (element {first} of "
                f"{count}); learner and engine must be the same model, or {_RELOAD}"
            )


def _sorted(views: Iterable[View]) -> np.ndarray:
    found = [view.intervals() for view in views]
    every = np.concatenate([np.empty((0, 2), np.int64), *found])
    return every[np.argsort(every[:, 0], kind="stable")]


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the one past the last."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _words(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__
