"""Passes over rows of logits, launched; `row_kernels` says what they cost."""

from __future__ import annotations

import torch

from polymath_fast.kernels.triton.row_kernels import (
    fused_kernel,
    slopes_kernel,
    statistics_kernel,
)

LANES = 512
WARPS = 4
FUSED_LANES = 2048
FUSED_WARPS = 16
L2_SHARE = 0.6
"""of the L2 cache that rows in flight of the fused kernel may take"""


def statistics(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """(4, N) fp32: log-prob of `targets`, entropy, 1 - p of the target, log2-sum-exp2 of the row.

    `logits` (N, V) may have any strides. A target outside [0, V) makes its row NaN.
    """
    count, vocab = logits.shape
    found = torch.empty(4, count, dtype=torch.float32, device=logits.device)
    if count:
        with torch.cuda.device_of(logits):
            statistics_kernel[(count,)](
                logits,
                targets,
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
                targets,
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
    """`statistics` and `slopes` in one sweep over memory, for g that is known beforehand."""
    count, vocab = logits.shape
    found = torch.empty(4, count, dtype=torch.float32, device=logits.device)
    if count:
        with torch.cuda.device_of(logits):
            fused_kernel[(_rows_in_flight(logits),)](
                logits,
                targets,
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
                LANES=FUSED_LANES,
                WIDTH=_width(logits),
                num_warps=FUSED_WARPS,
            )
    return found


def _width(logits: torch.Tensor) -> int:
    """Neighbouring entries that one thread loads at once: 16 bytes."""
    return 16 // logits.element_size()


def _rows_in_flight(logits: torch.Tensor) -> int:
    count, vocab = logits.shape
    if not logits.is_cuda:
        return min(count, 4)
    device = torch.cuda.get_device_properties(logits.device)
    fitting = int(L2_SHARE * device.L2_cache_size) // (vocab * logits.element_size())
    return min(count, max(fitting, device.multi_processor_count))
