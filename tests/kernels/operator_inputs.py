"""Inputs of every operator by name, and a call of it that can be differentiated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from polymath_fast.kernels import grpo_loss, linear_grpo_loss, linear_logprobs, token_logprobs

ROWS, VOCAB, SIZE = 12, 70, 16
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
OPERATORS = ("token_logprobs", "linear_logprobs", "grpo_loss", "linear_grpo_loss")
LOSSES = ("grpo_loss", "linear_grpo_loss")
operators = pytest.mark.parametrize("op", OPERATORS)
losses = pytest.mark.parametrize("op", LOSSES)
impls = pytest.mark.parametrize("impl", ["cpu", "reference"])


def make(op: str, rows: int = ROWS, dtype: torch.dtype = FP32) -> dict[str, Tensor]:
    """Inputs by name."""
    generator = torch.Generator().manual_seed(3)
    given = {"targets": torch.randint(VOCAB, (rows,), generator=generator)}
    if op.startswith("linear"):
        given["hidden"] = torch.randn(rows, SIZE, generator=generator).to(dtype)
        given["weight"] = torch.randn(VOCAB, SIZE, generator=generator).to(dtype)
    else:
        given["logits"] = 3 * torch.randn(rows, VOCAB, generator=generator).to(dtype)
    if op.endswith("loss"):
        given["advantages"] = torch.tensor([1.0, -0.5])
        given["cu_seqlens"] = torch.tensor([0, rows // 2, rows], dtype=torch.int32)
    return given


def call(op: str, given: dict[str, Tensor], **options: object) -> tuple[Tensor, Tensor]:
    """Log-probs, and a scalar to differentiate."""
    function: Callable = {
        "token_logprobs": token_logprobs,
        "linear_logprobs": linear_logprobs,
        "grpo_loss": grpo_loss,
        "linear_grpo_loss": linear_grpo_loss,
    }[op]
    out = function(**given, **options)
    if isinstance(out, tuple):
        return out[0], out[0].sum() + 0.1 * out[1].sum()
    return out.logprobs, out.loss


def main_input(op: str) -> str:
    return "hidden" if op.startswith("linear") else "logits"


def gradient(op: str, given: dict[str, Tensor], **options: object) -> tuple[Tensor, Tensor]:
    """Log-probs and gradient of the main input."""
    name = main_input(op)
    given = {**given, name: given[name].detach().requires_grad_()}
    logprobs, scalar = call(op, given, **options)
    scalar.backward()
    return logprobs.detach(), given[name].grad
