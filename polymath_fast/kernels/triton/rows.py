"""Passes over rows of logits, launched; `row_kernels` says what they cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from polymath_fast.kernels.faults import note_for
from polymath_fast.kernels.triton.row_kernels import (
    fused_kernel,
    slopes_kernel,
    statistics_kernel,
    targets_kernel,
)
from polymath_fast.kernels.triton.tiles import in_vectors

LANES = 512
WARPS = 4
L2_SHARE = 0.6
"""of the L2 cache that rows in flight of the fused kernel may take"""
FUSED_REGISTERS = 128
"""a thread; 65536 of them in all, shared by 512 threads"""


@dataclass(frozen=True)
class Fused:
    """How the fused kernel runs: each program has a row in flight."""

    lanes: int
    warps: int
    programs: int
    """on a multiprocessor, as its registers allow"""


FUSED_TWO = Fused(1024, 8, 2)
"""one program's sums hide behind the other's loads"""
FUSED_ONE = Fused(2048, 16, 1)
"""for rows so long that twice as many would not stay in the cache"""


def statistics(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    """(4, N) fp32: log-prob of `targets`, entropy, 1 - p of the target, log2-sum-exp2 of the row.

    `logits` (N, V) may have any strides. A target outside [0, V) makes its row NaN and is noted,
    under its number in `index` (N,) int64 if that is given.
    """
    count, vocab = logits.shape
    found = torch.empty(4, count, dtype=torch.float32, device=logits.device)
    if count:
        with torch.cuda.device_of(logits):
            statistics_kernel[(count,)](
                logits,
                targets.contiguous(),
                index,
                note_for(logits.device),
                found,
                *logits.stride(),
                vocab,
                count,
                temperature,
                LANES=LANES,
                WIDTH=_width(logits),
                num_warps=WARPS,
            )
    return found


def slopes(
    logits: torch.Tensor,
    targets: torch.Tensor,
    found: torch.Tensor,
    g: torch.Tensor,
    g_entropy: torch.Tensor | None,
    temperature: float,
    out: torch.Tensor,
) -> None:
    """out (N, V) = gradient by `logits`; g, g_entropy (N,): the loss's, by log-prob and entropy.

    Args:
        found: what `statistics` returned for the same logits.
        out: any float dtype; may be `logits`.
    """
    count, vocab = logits.shape
    if count:
        with torch.cuda.device_of(logits):
            slopes_kernel[(count,)](
                logits,
                targets.contiguous(),
                found,
                g.float().contiguous(),
                None if g_entropy is None else g_entropy.float().contiguous(),
                out,
                *logits.stride(),
                *out.stride(),
                vocab,
                count,
                temperature,
                BONUS=g_entropy is not None,
                LANES=LANES,
                WIDTH=_width(logits),
                num_warps=WARPS,
            )


def statistics_and_slopes(
    logits: torch.Tensor,
    targets: torch.Tensor,
    g: torch.Tensor,
    g_entropy: torch.Tensor | None,
    temperature: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """`statistics` and `slopes` in one sweep over memory, for g that is known beforehand.

    In two where a row begins at any address: the fused kernel has no registers for single loads.
    """
    if not fuses(logits, out):
        return _one_after_the_other(logits, targets, g, g_entropy, temperature, out)
    count, vocab = logits.shape
    found = torch.empty(4, count, dtype=torch.float32, device=logits.device)
    if count:
        way, programs = _fused(logits)
        with torch.cuda.device_of(logits):
            targets_kernel[(triton.cdiv(count, 1024),)](
                targets.contiguous(), note_for(logits.device), vocab, count, BLOCK=1024, num_warps=4
            )
            fused_kernel[(programs,)](
                logits,
                targets.contiguous(),
                g.float().contiguous(),
                None if g_entropy is None else g_entropy.float().contiguous(),
                found,
                out,
                *logits.stride(),
                *out.stride(),
                vocab,
                count,
                temperature,
                BONUS=g_entropy is not None,
                LANES=way.lanes,
                WIDTH=_width(logits),
                num_warps=way.warps,
                maxnreg=FUSED_REGISTERS,
            )
    return found


def fuses(*matrices: torch.Tensor) -> bool:
    """Whether Triton knows that vectors of each row lie where 16 bytes are loaded at once."""
    return all(in_vectors(matrix) for matrix in matrices if matrix.is_cuda)


def _one_after_the_other(
    logits: torch.Tensor,
    targets: torch.Tensor,
    g: torch.Tensor,
    g_entropy: torch.Tensor | None,
    temperature: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """What `statistics_and_slopes` does, by a kernel each."""
    found = statistics(logits, targets, temperature)
    sound = found[0].isfinite()
    g, g_entropy = (None if x is None else torch.where(sound, x, 0) for x in (g, g_entropy))
    slopes(logits, targets, found, g, g_entropy, temperature, out)
    return found


def _width(logits: torch.Tensor) -> int:
    """Neighbouring entries that one thread loads at once: 16 bytes."""
    return 16 // logits.element_size()


def _fused(logits: torch.Tensor) -> tuple[Fused, int]:
    """The way to run the fused kernel, and its number of programs."""
    if not logits.is_cuda:
        return FUSED_TWO, min(len(logits), 4)
    device = torch.cuda.get_device_properties(logits.device)
    row_bytes = logits.shape[1] * logits.element_size()
    processors = device.multi_processor_count
    room = L2_SHARE * device.L2_cache_size
    way = FUSED_TWO if 2 * processors * row_bytes <= room else FUSED_ONE
    return way, min(len(logits), way.programs * processors)
