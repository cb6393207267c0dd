"""How updated weights reach the sampler. One strategy object per engine, one word per strategy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from polymath_fast.errors import EngineError, UserError
from polymath_fast.learner.flat_storage import FlatStorage

_CHUNK = 1 << 18  # 64-bit words that are multiplied at a time, so that the products stay in a cache


class WeightSync(Protocol):
    """Brings the learner's weights to the engine and remembers which version it holds."""

    name: str
    version: int
    """optimizer updates the engine's weights have seen; stamped on every completion"""

    def attach(self, model: nn.Module) -> FlatStorage | None:
        """Meet the learner's model, once and before its optimizer is made.

        Returns the storage that the optimizer has to keep the weights in, of which the parameters
        of `model` are views from now on, or None when the learner's memory is its own affair.
        """

    def push(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Make the engine sample from `named_weights` (Hugging Face names) from now on."""

    def verify(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Raise EngineError naming a tensor of the engine that is not the learner's, bit by bit."""


class IdentitySync:
    """Engine and learner use one module: the optimizer's store has already been the sync."""

    name = "identity"

    def __init__(self) -> None:
        self.version = 0

    def attach(self, model: nn.Module) -> None:
        """The learner's memory is the engine's."""

    def push(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Only the version moves."""
        self.version = version

    def verify(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """There is one set of weights, so there is nothing to compare."""


def bind(model: nn.Module, storage: FlatStorage) -> list[tuple[str, nn.Parameter]]:
    """Make every parameter of `model` a view of the engine's memory, where its values already are.

    Returns (name, parameter), a tied weight once. Raises UserError when model and engine do not
    have the same tensors, EngineError when they loaded different values; nothing is bound then.
    """
    bound, views = list(model.named_parameters()), storage.views()
    for name, param in bound:
        view = views.get(name)
        if view is None:
            raise UserError(
                f"the engine did not load {name} as a tensor of its own and of the same shape, as "
                "the learner did: a head that only one of them ties to the embedding, or a "
                "head_dim that only one of them reads from config.json; mend config.json, or take "
                "--engine transformers"
            )
        for what in ("shape", "dtype", "device"):
            ours, theirs = getattr(param, what), getattr(view, what)
            if ours != theirs:
                raise UserError(
                    f"{name} has {what} {_word(ours)} in the learner and {_word(theirs)} in the "
                    "engine, so they cannot be one tensor; use one model, one dtype (bfloat16) and "
                    "one device for both, or --weight-sync reload"
                )
        if not torch.equal(param.data, view):
            raise EngineError(f"learner and engine loaded different values for {name}")
    extra = views.keys() - {name for name, _ in bound}
    if extra:
        raise UserError(
            f"the engine has a tensor {min(extra)} that the learner lacks (a head that it ties to "
            "the embedding?), so it would never be updated; set tie_word_embeddings in config.json "
            "to what the weights are"
        )
    for name, param in bound:
        param.data = views[name]
    return bound


def compare(named_weights: Iterable[tuple[str, Tensor]], views: Mapping[str, Tensor]) -> None:
    """Raise EngineError naming the tensors whose checksum differs between learner and engine.

    Args:
        named_weights: the learner's; names that `views` lacks (a tied head) are passed over.
        views: Hugging Face name -> the engine's tensor; all of them must be named.
    """
    ours = {name: tensor for name, tensor in named_weights if name in views}
    if missing := views.keys() - ours.keys():
        raise EngineError(f"the learner has no {min(missing)}, which the engine samples with")
    sums = zip(*(checksums([side[name] for name in views]) for side in (ours, views)), strict=True)
    differing = [name for name, (left, right) in zip(views, sums, strict=True) if left != right]
    if differing:
        raise EngineError(
            f"{len(differing)} of {len(views)} tensors of the engine are not the learner's after "
            f"the weight sync, the first is {differing[0]}"
        )


def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """A 64-bit sum of each tensor's bytes, the same wherever the tensor lies.

    Words are multiplied with odd numbers that depend on their place before they are added modulo
    2^64, so a changed word always shows, and two that changed places nearly always.
    """
    factors, found = None, []
    for tensor in tensors:
        words = _words(tensor.detach())
        if factors is None:
            factors = torch.arange(1, 2 * _CHUNK, 2, device=words.device)
        total = words.new_zeros(())
        for part in words.split(_CHUNK):
            total = total * 31 + (part * factors[: len(part)]).sum()
        found.append(total)
    return torch.stack(found).tolist() if found else []


def _words(tensor: Tensor) -> Tensor:
    """(words,) int64, or int16 / uint8 when the tensor's bytes do not fill whole 64-bit words."""
    flat = tensor.contiguous().view(-1)
    if flat.nbytes % 8:
        return flat.view(torch.int16 if flat.nbytes % 2 == 0 else torch.uint8).to(torch.int64)
    aligned = flat.storage_offset() * flat.element_size() % 8 == 0
    return (flat if aligned else flat.clone()).view(torch.int64)


def _word(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)
