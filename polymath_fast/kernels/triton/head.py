"""The LM head on a GPU, a chunk of rows at a time: log-probs, entropies and unnormalised p.

bf16 inputs take the kernel whose epilogue stores exponentials (`head_kernels`), 2 bytes a logit of
the chunk. fp16 and fp32 inputs, whose range or precision bf16 exponentials would not keep, take a
cuBLAS product to fp32 logits and two row passes, 6 and 4 bytes a logit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from polymath_fast.kernels.faults import note_for
from polymath_fast.kernels.scratch import Scratch
from polymath_fast.kernels.triton import rows
from polymath_fast.kernels.triton.budget import chunk_rows, gpu_of, width_of
from polymath_fast.kernels.triton.head_kernels import (
    exp_gemm_kernel,
    finish_kernel,
    target_logits_kernel,
)
from polymath_fast.kernels.triton.products import product
from polymath_fast.kernels.triton.tiles import (
    describable,
    flattens,
    processors,
    tiles_for,
)


@dataclass(frozen=True)
class Chunk:
    """Some rows of the head."""

    index: torch.Tensor  # (C,) int64, which rows
    hidden: torch.Tensor  # (C, H)
    targets: torch.Tensor  # (C,) int64
    found: torch.Tensor  # (4, C) fp32: log-prob, entropy, 1 - p of the target, 1 / sum of `exps`
    live: torch.Tensor | None  # (1,) int32, how many rows, the first ones, have `exps`
    exps: torch.Tensor | None  # (C, V) p times a factor a row, 0 for the target; if asked for
    """Zeros in rows past the live ones up to a multiple of `LIVE_STEP`, anything after those."""


class Head:
    """An LM head, ready to take chunks of rows.

    Args:
        hidden: (N, H); weight: (V, H); bias: (V,) or None; targets: (N,) int64.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
    ) -> None:
        self.hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        self.weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.targets = targets.contiguous()
        self.temperature = temperature
        self.vocab, self.depth = weight.shape
        self.by_exps = hidden.dtype == torch.bfloat16
        self.tiles = tiles_for(hidden.device, self.hidden, self.weight)
        self.width = width_of(self.vocab)
        self.rows = self._rows_that_fit()
        self._scratch = Scratch(hidden.device)

    def chunk(
        self,
        index: torch.Tensor,
        whole: slice | None,
        live: torch.Tensor | None,
        others: bool = True,
    ) -> Chunk:
        """The rows `index` (C,); `whole` is the same as a slice, where they are neighbours.

        live: (1,) int32, how many of the rows, the first ones, need `exps`, which are handed out
            until the next chunk that has any; None: no row does.
        others: whether the rows after those need log-probs; NaN if not.
        """
        if whole is None:
            hidden, targets = self.hidden[index], self.targets[index]
        else:
            hidden, targets = self.hidden[whole], self.targets[whole]
        others = others or live is None
        with torch.cuda.device_of(hidden):
            rows = self._exps if self.by_exps else self._logits
            found, exps = rows(hidden, targets, index, live, others)
        return Chunk(index, hidden, targets, found, live, exps)

    def release(self) -> None:
        """Give scratch memory back, `exps` of every chunk with it."""
        self._scratch.release()

    def _exps(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        index: torch.Tensor,
        live: torch.Tensor | None,
        others: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        count, tiles = len(hidden), triton.cdiv(self.vocab, self.tiles.n)
        # apart: halves of one tensor would be aligned for some counts only, and compile twice
        y_target = torch.empty(count, device=hidden.device, dtype=torch.float32)
        offset = torch.empty_like(y_target)
        target_logits_kernel[(count,)](
            hidden,
            self.weight,
            self.bias,
            targets,
            index,
            note_for(hidden.device),
            y_target,
            offset,
            hidden.stride(0),
            self.weight.stride(0),
            self.vocab,
            self.depth,
            self.temperature,
            BIAS=self.bias is not None,
            BLOCK=1024,
            num_warps=4,
        )
        again = torch.empty(count, dtype=torch.int8, device=hidden.device)
        any_again = torch.zeros(1, dtype=torch.int32, device=hidden.device)
        partial = self._scratch.buffer("partial", 3 * tiles * count, torch.float32)
        exps = None
        if live is not None:
            exps = self._scratch.buffer("exps", count * self.width, hidden.dtype)
            exps = exps.view(count, self.width)
        found = torch.empty(4, count, device=hidden.device, dtype=torch.float32)
        for repeat in (False, True):
            marks = (again, any_again if repeat else None)
            self._product(hidden, targets, offset, *marks, live, exps, partial, others)
            finish_kernel[(triton.cdiv(count, 32),)](
                partial,
                y_target,
                offset,
                again,
                any_again,
                None if others else live,
                found,
                count,
                tiles,
                AGAIN=repeat,
                OTHERS=others,
                BLOCK_R=32,
                BLOCK_T=32,
                num_warps=4,
            )
        return found, None if exps is None else exps[:, : self.vocab]

    def _product(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        offset: torch.Tensor,
        again: torch.Tensor,
        any_again: torch.Tensor | None,
        live: torch.Tensor | None,
        exps: torch.Tensor | None,
        partial: torch.Tensor,
        others: bool,
    ) -> None:
        tiles, count = self.tiles, len(hidden)
        operands = (hidden, self.weight)
        by_descriptor = all(describable(operand) for operand in operands)
        if by_descriptor:
            sizes = (tiles.m, tiles.n)
            operands = tuple(
                TensorDescriptor.from_tensor(operand, [size, tiles.k])
                for operand, size in zip(operands, sizes, strict=True)
            )
        programs = triton.cdiv(count, tiles.m) * triton.cdiv(self.vocab, tiles.n)
        again_only = any_again is not None
        if again_only or tiles.persistent:
            programs = min(programs, processors(hidden.device))
        flatten = tiles.persistent and others and not again_only and flattens(hidden.device)
        exp_gemm_kernel[(programs,)](
            *operands,
            self.bias,
            targets,
            offset,
            again,
            any_again,
            live,
            exps,
            partial,
            count,
            self.vocab,
            self.depth,
            hidden.stride(0),
            self.weight.stride(0),
            self.width,
            self.temperature,
            BIAS=self.bias is not None,
            STORE=exps is not None,
            OTHERS=others,
            AGAIN=again_only,
            FLATTEN=flatten,
            DESCRIPTORS=by_descriptor,
            WIDEN=not hidden.is_cuda,
            BLOCK_M=tiles.m,
            BLOCK_N=tiles.n,
            BLOCK_K=tiles.k,
            GROUP_M=tiles.group,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )

    def _logits(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        index: torch.Tensor,
        live: torch.Tensor | None,
        others: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        count = len(hidden)
        logits = self._scratch.buffer("logits", count * self.vocab, torch.float32)
        logits = logits.view(count, self.vocab)
        product(hidden, self.weight.T, logits)
        if self.bias is not None:
            logits += self.bias
        found = rows.statistics(logits, targets, self.temperature, index)
        if live is None:
            return found, None
        exps = logits
        if hidden.dtype != torch.float32:
            exps = self._scratch.buffer("exps", count * self.width, hidden.dtype)
            exps = exps.view(count, self.width)[:, : self.vocab]
        # the gradient for -T and for a target that is certain: p elsewhere, 0 for the target
        kept = torch.arange(count, device=hidden.device) < live
        certain = found.clone()
        certain[2].zero_()
        rows.slopes(
            logits,
            targets,
            certain,
            torch.where(kept, -self.temperature, 0.0),
            None,
            self.temperature,
            exps,
        )
        found[3].fill_(1)
        return found, exps

    def _rows_that_fit(self) -> int:
        count, gpu = len(self.hidden), gpu_of(self.hidden.device)
        return chunk_rows(count, self.vocab, self.depth, self.hidden.dtype, gpu)
