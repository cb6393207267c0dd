"""Memory of the LM head on a GPU: how many rows it takes at a time, and what it then holds.

Pure arithmetic: `head` cuts its work by `chunk_rows`, `memory.estimate` counts by `head_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polymath_fast.kernels.active_vocabulary import SOME_COLUMNS
from polymath_fast.kernels.triton.tiles import LIVE_STEP, TILES, best_rows, kind_of, processors

MEMORY_SHARE = 64
"""a chunk may take this fraction of the device's memory"""
SMALLEST_BUDGET = 2**27
CELLS = {torch.bfloat16: 2, torch.float16: 6, torch.float32: 4}
"""bytes of a chunk's logit: its exponential, in the dtype of the inputs, and the fp32 logit where
the product does not make exponentials by itself (in fp32 the one becomes the other)"""


@dataclass(frozen=True)
class Gpu:
    """What of a device decides how the head is cut."""

    memory: int
    """bytes in all; 0 for an interpreter, which stands for a small one"""
    processors: int
    kind: str
    """key of `TILES`"""


def gpu_of(device: torch.device) -> Gpu:
    """The device as it is."""
    memory = 0
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    return Gpu(memory, processors(device), kind_of(device))


def width_of(vocab: int) -> int:
    """Elements of a chunk's row: 128-byte rows, so that products may read them in whole lines."""
    return -(-vocab // 64) * 64


def room_for(vocab: int, dtype: torch.dtype) -> int:
    """Columns that a choice of some may have; 0: inputs of fp32 keep all columns."""
    return 0 if dtype == torch.float32 else int(SOME_COLUMNS * vocab) // LIVE_STEP * LIVE_STEP


def chunk_rows(count: int, vocab: int, depth: int, dtype: torch.dtype, gpu: Gpu) -> int:
    """Rows of a chunk, of `count` (N) in all; it may be more than these.

    Args:
        vocab, depth: V and H of the head; dtype: of the inputs.
    """
    budget = max(gpu.memory // MEMORY_SHARE, SMALLEST_BUDGET)
    most = budget // (CELLS[dtype] * width_of(vocab))
    return best_rows(count, most, depth, gpu.processors, TILES[gpu.kind])


def head_bytes(
    count: int, vocab: int, depth: int, dtype: torch.dtype, gpu: Gpu, *, some_columns: bool = False
) -> int:
    """Bytes that `linear_grpo_loss` holds at most beside its inputs, for `count` (N) rows.

    All along: the gradients of hidden, (N, H), and of the weight, (V, H) in fp32. Beside them first
    a chunk's scratch, then the weight's gradient in its own dtype.

    Args:
        some_columns: whether `vocab_tol` chooses columns; their copies are scratch, too.
    """
    size = dtype.itemsize
    rows = min(count, chunk_rows(count, vocab, depth, dtype, gpu))
    scratch = rows * (CELLS[dtype] * width_of(vocab) + 2 * size * depth)
    if dtype == torch.bfloat16:  # three partial sums a tile and row
        scratch += 4 * 3 * -(-vocab // TILES[gpu.kind].n) * rows
    if some_columns:
        room = room_for(vocab, dtype)
        scratch += room * (size * rows + (size + 4) * depth)
    result = size * vocab * depth if size < 4 else 0
    return size * count * depth + 4 * vocab * depth + max(scratch, result)
