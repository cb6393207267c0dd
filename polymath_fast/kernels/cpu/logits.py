"""Rows of given logits on a CPU: statistics in one read, the gradient in one read and one write."""

from __future__ import annotations

import numpy as np
import torch

from polymath_fast.kernels.cpu import rows
from polymath_fast.kernels.cpu.threads import parallel, split


class LogitRows:
    """Compiled passes over `logits` (N, V) of bf16, fp16 or fp32 with any strides."""

    def __init__(self, logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> None:
        # rows may overlap (expanded) or lie apart, but each must be contiguous for vector code
        self._logits = logits if logits.stride(1) == 1 else logits.contiguous()
        self._targets = np.ascontiguousarray(targets.numpy())
        self._scale = np.float32(1 / temperature)
        self._half = logits.dtype == torch.float16
        self.found = torch.empty(4, logits.shape[0], dtype=torch.float64)

    def statistics(self) -> torch.Tensor:
        """(4, N) fp64, see `rows`."""
        count, vocab = self._logits.shape
        parallel(
            rows.logits_statistics,
            split(count),
            _flat(self._logits),
            self._logits.stride(0),
            vocab,
            self._half,
            self._targets,
            self._scale,
            self.found.numpy(),
        )
        return self.found

    def gradient(
        self, by_logprob: torch.Tensor, by_entropy: torch.Tensor, *, inplace: bool
    ) -> torch.Tensor:
        """(N, V) d loss / d logits; `inplace`: in the memory of the logits."""
        count, vocab = self._logits.shape
        source = self._logits
        if inplace and source.stride(0) >= vocab:
            out = source
        else:
            out = torch.empty_like(source, memory_format=torch.contiguous_format)
        # an excluded target has no log-prob to speak of, but its row may have an entropy
        by_logprob, by_entropy = (
            torch.where(found.isfinite(), slope, 0).float()
            for found, slope in zip(self.found[:2], (by_logprob, by_entropy), strict=True)
        )
        parallel(
            rows.logits_slopes,
            split(count),
            _flat(source),
            source.stride(0),
            vocab,
            self._half,
            self._targets,
            self._scale,
            self.found.numpy(),
            by_logprob.numpy(),
            by_entropy.numpy(),
            _flat(out),
            out.stride(0),
        )
        return out


def _flat(tensor: torch.Tensor) -> np.ndarray:
    """The memory from the first element to the last as one row; half precisions as bits."""
    span = 1 + sum(
        step * (size - 1) for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
    flat = tensor.detach().as_strided((max(span, 0) if tensor.numel() else 0,), (1,))
    return (flat.view(torch.uint16) if flat.element_size() == 2 else flat).numpy()
