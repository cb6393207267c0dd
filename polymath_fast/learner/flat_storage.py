"""Where the trained weights lie: all of them in one flat tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FlatStorage:
    """One tensor of live weights, and the place of each trained parameter in it.

    The tensor may be somebody else's, for example the parameters of an inference engine: places
    come in any order, and elements between them (padding, weights that are not trained) are never
    read or written. Optimizer state is as long as `live`, so gaps cost memory.

    Raises:
        ValueError: `live` is not 1-D and contiguous, a place lies outside of it, or two overlap.
    """

    live: Tensor
    """(elements,) contiguous, in the model's dtype, on its device"""
    places: Mapping[str, tuple[int, tuple[int, ...]]]
    """name in `model.named_parameters()` -> offset of its first element, and its shape; rows of a
    stacked matrix are one run of elements"""

    def __post_init__(self) -> None:
        if self.live.dim() != 1 or not self.live.is_contiguous():
            raise ValueError(
                f"live is {tuple(self.live.shape)} with strides {self.live.stride()}; it must be "
                "one contiguous dimension, such as torch.empty(elements)"
            )
        end, last = 0, "the start"
        for name, (start, stop) in sorted(self.spans().items(), key=lambda item: item[1]):
            if start < end or stop > self.live.numel():
                raise ValueError(
                    f"{name} lies at {start}:{stop} of {self.live.numel()} elements, after "
                    f"{last}, which ends at {end}; places must not overlap or leave the tensor"
                )
            end, last = stop, name

    @classmethod
    def of(cls, model: nn.Module) -> FlatStorage:
        """A tensor of its own for the trained parameters, in the order of `trained`."""
        named = trained(model)
        places, offset = {}, 0
        for name, parameter in named.items():
            places[name] = (offset, tuple(parameter.shape))
            offset += parameter.numel()
        return cls(torch.cat([p.data.reshape(-1) for p in named.values()]), places)

    def spans(self) -> dict[str, tuple[int, int]]:
        """Name -> its first element and the one after its last, in the order of `places`."""
        return {
            name: (offset, offset + torch.Size(shape).numel())
            for name, (offset, shape) in self.places.items()
        }

    def views(self) -> dict[str, Tensor]:
        """Name -> the tensor of that shape that lies in `live`."""
        return {
            name: self.live[start:stop].view(self.places[name][1])
            for name, (start, stop) in self.spans().items()
        }

    def adopt(self, model: nn.Module) -> None:
        """Copy the trained parameters into their places and make them views of `live`.

        Raises:
            ValueError: a parameter has no place, or one of another shape, dtype or device.
        """
        for name, parameter in trained(model).items():
            if name not in self.places:
                raise ValueError(f"{name} is trained but has no place in the storage")
            offset, shape = self.places[name]
            ours = (shape, self.live.dtype, self.live.device)
            theirs = (tuple(parameter.shape), parameter.dtype, parameter.device)
            if ours != theirs:
                raise ValueError(f"{name} is {theirs}, its place in the storage is {ours}")
            view = self.live[offset : offset + parameter.numel()].view(shape)
            view.copy_(parameter.data)
            parameter.data = view


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, each once: decayed ones first, else the model's order."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return dict(sorted(named, key=lambda item: not decayed(item[1])))


def decayed(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices have it, norms and biases do not."""
    return parameter.dim() >= 2
