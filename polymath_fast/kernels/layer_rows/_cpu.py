"""Row passes of a decoder layer on a CPU: compiled, a range of rows for each thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polymath_fast.kernels.cpu import layers
from polymath_fast.kernels.cpu.operands import bits
from polymath_fast.kernels.cpu.threads import parallel, split

_SMALL = 1 << 16
"""elements of a pass below which a second thread is not worth waking"""


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See `layer_rows.rms_norm`."""
    _rows_pass(layers.rms_norm, x, bits(weight), np.float32(eps), bits(out))


def rms_norm_gradient(
    x: Tensor, weight: Tensor, eps: float, upstream: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `layer_rows.rms_norm_gradient`."""
    out = torch.empty_like(x)
    ranges, slots = _ranges(len(x), x.numel())
    d_weight = torch.zeros(len(ranges), x.shape[1], dtype=torch.float32)
    residual = torch.zeros_like(x) if residual is None else residual
    parallel(
        layers.rms_norm_gradient, ranges, bits(x), bits(weight), np.float32(eps), bits(upstream),
        bits(residual), bits(out), slots, d_weight.numpy(),
    )  # fmt: skip
    return out, d_weight.sum(0).to(weight.dtype)


def rotate(
    stacked: Tensor,
    counts: tuple[int, int],
    cos: Tensor,
    sin: Tensor,
    head_norms: tuple[Tensor | None, Tensor | None],
    eps: float,
    out: Tensor,
) -> None:
    """See `layer_rows.rotate`."""
    _rows_pass(
        layers.rotate, stacked, sum(counts), bits(cos), bits(sin),
        norms_by_head(head_norms, counts), np.float32(eps), bits(out),
    )  # fmt: skip


def rotate_gradient(
    raw: Tensor | None,
    counts: tuple[int, int],
    cos: Tensor,
    sin: Tensor,
    head_norms: tuple[Tensor | None, Tensor | None],
    eps: float,
    upstream: Sequence[Tensor],
    out: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """See `layer_rows.rotate_gradient`."""
    ranges, slots = _ranges(len(out), out.numel())
    d_norms = torch.zeros(len(ranges), sum(counts), out.shape[2], dtype=torch.float32)
    parallel(
        layers.rotate_gradient, ranges, bits(out if raw is None else raw), sum(counts), bits(cos),
        bits(sin), norms_by_head(head_norms, counts), np.float32(eps), *map(bits, upstream),
        bits(out), slots, d_norms.numpy(),
    )  # fmt: skip
    if head_norms[0] is None:
        return None, None
    d_queries, d_keys = (part.sum(0).to(out.dtype) for part in d_norms.sum(0).split(counts))
    return d_queries, d_keys


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """See `layer_rows.swiglu`."""
    _rows_pass(layers.swiglu, gate_up, bits(out))


def swiglu_gradient(gate_up: Tensor, upstream: Tensor, out: Tensor) -> None:
    """See `layer_rows.swiglu_gradient`."""
    _rows_pass(layers.swiglu_gradient, gate_up, bits(upstream), bits(out))


def norms_by_head(
    head_norms: tuple[Tensor | None, Tensor | None], counts: Sequence[int]
) -> np.ndarray:
    """(Hq + Hkv, D) fp32 weights of the norm of each head; (0, 1) where heads have none."""
    if head_norms[0] is None:
        return np.empty((0, 1), np.float32)
    pairs = zip(head_norms, counts, strict=False)
    return torch.cat([each.detach().float().expand(count, -1) for each, count in pairs]).numpy()


def _rows_pass(kernel: Callable[..., None], x: Tensor, *args: Any) -> None:
    """kernel(start, stop, x, *args) on ranges of x's rows."""
    ranges = [(0, len(x))] if x.numel() < _SMALL else split(len(x))
    parallel(kernel, ranges, bits(x), *args)


def _ranges(rows: int, elements: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Ranges of rows for the threads, and the number of a range by its first row."""
    ranges = [(0, rows)] if elements < _SMALL else split(rows)
    slots = np.zeros(rows + 1, np.int64)
    for number, (start, _) in enumerate(ranges):
        slots[start] = number
    return ranges, slots
