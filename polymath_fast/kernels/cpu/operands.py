"""Operands as the compiled products read them: tensors as bits, and packed into panels."""

from __future__ import annotations

import numpy as np
import torch

from polymath_fast.kernels.cpu import bf16, blocks, tiles
from polymath_fast.kernels.cpu.threads import parallel, split
from polymath_fast.kernels.cpu.workspace import buffer


def pack_layers(name: str, *stacks: list[torch.Tensor]) -> np.ndarray:
    """(L, stacks * panels, words of inputs, 48): weights (outputs, inputs) of every layer as right
    operands of a product, panels of the stacks by turns, in scratch memory called `name`."""
    wide, count = panel_count(len(stacks[0][0])), len(stacks)
    layers = [[words(weight.detach().contiguous()) for weight in weights] for weights in stacks]
    shape = (len(layers[0]), wide * count, layers[0][0].shape[1], tiles.COLUMNS)
    packed = scratch_words(f"packed {name}", shape, layers[0][0].dtype)
    for number, weights in enumerate(layers):
        for layer, weight in enumerate(weights):
            parallel(bf16.pack_weight, split(wide), weight, packed[layer, number::count])
    return packed


def panel_count(columns: int) -> int:
    """Panels of a right operand with that many columns."""
    return -(-columns // tiles.COLUMNS)


def padded_rows(count: int) -> int:
    """`count` rounded up to what a block of a product may read."""
    return -(-count // blocks.PADDING) * blocks.PADDING


def pack_rows(name: str, matrix: torch.Tensor) -> np.ndarray:
    """(K, columns) bf16 as the right operand of a product that sums over K."""
    shape = (panel_count(matrix.shape[1]), (matrix.shape[0] + 1) // 2, tiles.COLUMNS)
    packed = scratch_words(name, shape)
    parallel(bf16.pack_pairs, split(shape[1]), bits(matrix.contiguous()), packed)
    return packed


def scratch_words(name: str, shape: tuple[int, ...], dtype: type = np.uint32) -> np.ndarray:
    """Scratch memory called `name` as what products count in."""
    return buffer(name, shape, torch.int32).numpy().view(dtype)


def bits(tensor: torch.Tensor) -> np.ndarray:
    """bf16 as the uint16 that it is stored as; other dtypes as they are."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def words(tensor: torch.Tensor) -> np.ndarray:
    """What products count in: bf16 (rows, 2 n) -> uint32 (rows, n); fp32 as it is."""
    return bits(tensor).view(np.uint32) if tensor.dtype == torch.bfloat16 else tensor.numpy()
