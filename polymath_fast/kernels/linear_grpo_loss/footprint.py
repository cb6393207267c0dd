"""What `linear_grpo_loss` holds while it works, for estimates: no tensor is made here.

Legend: N rows of a call, V vocabulary, H hidden.
"""

from __future__ import annotations

import torch

from polymath_fast.kernels.triton import budget
from polymath_fast.kernels.triton.budget import Gpu

_CPU_LOGITS = 2**25  # that are held at once on a CPU, in float32


def head_bytes(
    count: int, vocab: int, depth: int, dtype: torch.dtype, gpu: Gpu | None, some_columns: bool
) -> int:
    """Bytes at most, beside the inputs, for `count` (N) rows of `vocab` (V) logits.

    Args:
        gpu: None for a CPU.
        some_columns: whether `vocab_tol` chooses columns of the vocabulary.
    """
    if gpu is None:
        sums = 4 if dtype == torch.float32 else 8
        return 12 * min(_CPU_LOGITS, count * vocab) + sums * vocab * depth
    return budget.head_bytes(count, vocab, depth, dtype, gpu, some_columns=some_columns)


def lendable_bytes(
    count: int, vocab: int, depth: int, dtype: torch.dtype, gpu: Gpu | None
) -> list[int]:
    """Of these, the largest pieces that may lie in lent memory (`kernels.scratch`)."""
    if gpu is None:
        chunks = [4 * min(_CPU_LOGITS, count * vocab)] * 3
    else:
        rows = min(count, budget.chunk_rows(count, vocab, depth, dtype, gpu))
        chunks = [rows * budget.CELLS[dtype] * budget.width_of(vocab)]
    # the sum of a float32 weight's gradient is the result itself
    return chunks if dtype == torch.float32 else [*chunks, 4 * vocab * depth]
