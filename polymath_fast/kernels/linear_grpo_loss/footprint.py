"""What `linear_grpo_loss` holds while it works, for estimates: no tensor is made here.

Legend: N rows of a call, V vocabulary, H hidden.
"""

from __future__ import annotations

import torch

from polymath_fast.kernels.triton import budget
from polymath_fast.kernels.triton.budget import Gpu


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
        return sum(_cpu_blocks(count, vocab, dtype)) + sums * vocab * depth
    return budget.head_bytes(count, vocab, depth, dtype, gpu, some_columns=some_columns)


def lendable_bytes(
    count: int, vocab: int, depth: int, dtype: torch.dtype, gpu: Gpu | None
) -> list[int]:
    """Of these, the largest pieces that may lie in lent memory (`kernels.scratch`)."""
    if gpu is None:
        chunks = _cpu_blocks(count, vocab, dtype)
    else:
        rows = min(count, budget.chunk_rows(count, vocab, depth, dtype, gpu))
        chunks = [rows * budget.CELLS[dtype] * budget.width_of(vocab)]
    # the sum of a float32 weight's gradient is the result itself
    return chunks if dtype == torch.float32 else [*chunks, 4 * vocab * depth]


def _cpu_blocks(count: int, vocab: int, dtype: torch.dtype) -> list[int]:
    """Bytes of the logits and of the gradient rows that a CPU holds at once."""
    from polymath_fast.kernels.cpu import head, head_gradient

    rows = head.rows_that_fit(head.LOGITS_BYTES, 4 * vocab, count)
    width = head.odd_lines(vocab, dtype.itemsize)
    kept = head_gradient.capacity(rows, width * dtype.itemsize, count)
    return [4 * rows * head.odd_lines(vocab, 4), dtype.itemsize * kept * width]
