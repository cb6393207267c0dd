"""Matrix products of linear layers that share their input, on whatever the device does best.

Weights that lie side by side in memory, as in a flat parameter buffer, are multiplied as one.
N rows, H inputs, A outputs of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from polymath_fast.kernels.cpu.sink import sink_of
from polymath_fast.kernels.cpu.workspace import buffer


def linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> Tensor:
    """(N, sum of A) outputs of all layers, side by side; a new tensor."""
    biases = [bias for bias in biases if bias is not None]
    stacked = _stacked(weights)
    if stacked is not None and biases:
        return torch.addmm(torch.cat(biases), x, stacked.t())
    if stacked is not None:
        return torch.mm(x, stacked.t())
    out = torch.cat([torch.mm(x, weight.t()) for weight in weights], dim=1)
    return out.add_(torch.cat(biases)) if biases else out


def input_gradient(upstream: Tensor, weights: Sequence[Tensor], name: str) -> Tensor:
    """(N, H) = upstream (N, sum of A) @ all weights, in the scratch memory called `name`."""
    out = scratch(name, (len(upstream), weights[0].shape[1]), upstream)
    stacked = _stacked(weights)
    if stacked is not None:
        return torch.mm(upstream, stacked, out=out)
    for number, (weight, columns) in enumerate(zip(weights, _columns(weights), strict=True)):
        part = upstream[:, columns]
        torch.addmm(out, part, weight, out=out) if number else torch.mm(part, weight, out=out)
    return out


def weight_gradients(upstream: Tensor, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor | None]:
    """upstream (N, sum of A).T @ x (N, H), a part for each weight, in the weights' dtype.

    A weight with a `sink` gets its part added there in float32, and None is returned.
    """
    parts = [upstream[:, columns] for columns in _columns(weights)]
    sinks = [sink_of(weight) for weight in weights]
    found = [
        torch.mm(part.t(), x) if sink is None else None
        for part, sink in zip(parts, sinks, strict=True)
    ]
    totals = [(part, *sink()) for part, sink in zip(parts, sinks, strict=True) if sink is not None]
    stacked = _stacked([total for _, total, _ in totals]) if len(totals) == len(weights) else None
    if stacked is not None and len({add for *_, add in totals}) == 1:
        totals = [(upstream, stacked, totals[0][2])]
    if totals:
        (_add_on_cpu if x.device.type == "cpu" else _add_on_gpu)(totals, x)
    return found


def stacked_or_copied(weights: Sequence[Tensor]) -> Tensor:
    """(sum of A, H): the weights as one matrix, which is a copy where they lie apart."""
    stacked = _stacked(weights)
    return torch.cat([weight.detach() for weight in weights]) if stacked is None else stacked


def scratch(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor that dies with the call that asks: on a CPU the one that `name` got
    last time; a GPU's allocator does as much by itself."""
    if like.device.type == "cpu":
        return buffer(name, shape, like.dtype)
    return torch.empty(shape, dtype=like.dtype, device=like.device)


_Totals = Sequence[tuple[Tensor, Tensor, bool]]
"""upstream (N, A), the sum (A, H) fp32 that its product belongs to, and whether that holds any"""


def _add_on_cpu(totals: _Totals, x: Tensor) -> None:
    from polymath_fast.kernels.cpu.products import add_weight_gradient, packed_rows

    packed = packed_rows(x)
    for part, total, add in totals:
        add_weight_gradient(part, x, packed, total, add)


def _add_on_gpu(totals: _Totals, x: Tensor) -> None:
    from polymath_fast.kernels.triton.products import add_product, product

    for part, total, add in totals:
        (add_product if add else product)(part.t(), x, total)


def _columns(weights: Sequence[Tensor]) -> list[slice]:
    bounds = accumulate((weight.shape[0] for weight in weights), initial=0)
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _stacked(weights: Sequence[Tensor]) -> Tensor | None:
    """All weights as the one matrix that they are in memory; None where they are not."""
    first, rows = weights[0], 0
    for weight in weights:
        expected = first.data_ptr() + rows * first.stride(0) * first.element_size()
        if not weight.is_contiguous() or weight.data_ptr() != expected:
            return None
        rows += weight.shape[0]
    if len(weights) == 1:
        return first
    end = first.storage_offset() + rows * first.stride(0)
    if end * first.element_size() > first.untyped_storage().nbytes():
        return None  # neighbours by chance: separate allocations
    return first.detach().as_strided((rows, first.shape[1]), first.stride())
