"""Sections of the GPU suite about logits, and what all sections share.

Each section returns "rows" of times or "values", ready for JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from unittest import mock

import torch

from benchmarks import gpu_rivals, gpu_sizes, gpu_timing
from benchmarks.case import relative_error
from benchmarks.gpu_timing import interleave
from benchmarks.timing import Variants, copy_rate, gemm_rate
from polymath_fast.kernels import PolicyLossSpec, grpo_loss, token_logprobs
from polymath_fast.kernels.active_vocabulary import ROUNDING
from polymath_fast.kernels.grpo_loss import _triton as logit_loss

LOGPROB_ERROR = 1e-5
HEAD_ERROR = 2e-5
"""fp32 sums of thousands of products, logits of 30: what a product of fp32 itself is off by"""
OF_TORCH = 2.0
"""or that many times what torch's own bf16 product is off by: tensor cores cut off instead of
rounding, so the error of their sums has a direction and grows with their length"""
GRADIENT_ERROR = 3e-3
"""relative to the gradient's norm; rounding the result to bf16 makes 1.7e-3"""
COLUMNS_KEPT = 0.5
"""share; of those of `few_columns`, where one in twenty matters"""


@cache
def _rates() -> tuple[float, float]:
    """FLOP/s of bf16 products and bytes/s of copies, measured once."""
    return gemm_rate("cuda"), copy_rate("cuda")


def rates() -> dict[str, Any]:
    """What this GPU reaches."""
    gemm, copy = _rates()
    return {"values": {"bf16 TFLOP/s": gemm / 1e12, "copy TB/s": copy / 1e12}}


def _logits(count: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = torch.empty(count, vocab, dtype=torch.bfloat16, device="cuda").normal_(0, 4)
    targets = torch.randint(vocab, (count,), device="cuda")
    logits[torch.arange(0, count, 2, device="cuda"), targets[::2]] = 21.0
    return logits, targets


def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) advantages and cu_seqlens."""
    torch.manual_seed(1)
    length = gpu_sizes.SIZES.length
    ends = torch.arange(0, count + 1, length, device="cuda", dtype=torch.int32)
    return torch.randn(count // length, device="cuda"), ends


def correct_rows() -> dict[str, Any]:
    """`token_logprobs` and both ways of `grpo_loss` against float64."""
    count = gpu_sizes.SIZES.checked_rows
    logits, targets = _logits(count, gpu_sizes.SIZES.vocabs[0])
    advantages, ends = batch(count)
    exact = logits.double()
    logprobs, entropy = token_logprobs(logits, targets, impl="triton")
    truth = token_logprobs(exact, targets, impl="reference")
    values = {
        "logprob error": float((logprobs - truth[0]).abs().max()),
        "entropy error": float((entropy - truth[1]).abs().max()),
    }
    old = logprobs + 0.1 * torch.randn_like(logprobs)
    for name, given in (("on-policy", None), ("off-policy", old)):
        spec = PolicyLossSpec(entropy_coef=0.01)
        gradients = []
        for leaf, impl in ((logits.clone(), "triton"), (exact.clone(), "reference")):
            leaf.requires_grad_()
            kept = None if given is None else given.to(torch.float64)
            out = grpo_loss(
                leaf, targets, advantages, ends, old_logprobs=kept, spec=spec, impl=impl
            )
            out.loss.backward()
            gradients.append(leaf.grad)
        values[f"{name} gradient error"] = relative_error(*gradients)
    return gate(values)


def gate(values: dict[str, float], limit: Callable[[str], float] | None = None) -> dict[str, Any]:
    """Values, and an error that keeps the suite from passing if one is above its name's limit."""
    limit = limit or partial(_limit, values=values)
    # not "<=" turned round: a NaN is beyond every limit
    wrong = {name: value for name, value in values.items() if not value <= limit(name)}
    return {"values": values} | ({"error": f"beyond the limits: {wrong}"} if wrong else {})


def _limit(what: str, values: dict[str, float]) -> float:
    if what.startswith("torch"):
        return math.inf
    if "columns kept" in what:
        return COLUMNS_KEPT
    if "gradient" in what:
        return GRADIENT_ERROR + ROUNDING * ("auto" in what)
    if "head" in what:
        return max(HEAD_ERROR, OF_TORCH * values.get(f"torch {what}", 0.0))
    return LOGPROB_ERROR


def time_token_logprobs() -> dict[str, Any]:
    """Forward, N = 8192, V = 151936."""
    logits, targets = _logits(gpu_sizes.SIZES.rows, gpu_sizes.SIZES.vocabs[0])
    ours = {"triton": lambda: token_logprobs(logits, targets, impl="triton")}
    variants = ours | gpu_rivals.token_logprobs(logits, targets)
    return timed_table(variants, byte_count=logits.nbytes)


def time_grpo_loss() -> dict[str, Any]:
    """Forward and backward, N = 8192, V = 151936 and 49152."""
    found: list[dict[str, Any]] = []
    for vocab in gpu_sizes.SIZES.vocabs:
        logits, targets = _logits(gpu_sizes.SIZES.rows, vocab)
        old = token_logprobs(logits, targets, impl="triton")[0]
        table = timed_table(_logit_variants(logits, targets, old), byte_count=2 * logits.nbytes)
        found += [row | {"what": f"V={vocab} {row['what']}"} for row in table["rows"]]
        gpu_timing.keep({"rows": found})
    return {"rows": found}


def _logit_variants(logits: torch.Tensor, targets: torch.Tensor, old: torch.Tensor) -> Variants:
    advantages, ends = batch(len(targets))
    overwritten = logits.clone()

    def run(given: torch.Tensor | None, inplace: bool) -> None:
        leaf = (overwritten if inplace else logits).detach().requires_grad_()
        # a view, not a leaf: only such logits may be overwritten
        out = grpo_loss(
            leaf.view_as(leaf),
            targets,
            advantages,
            ends,
            old_logprobs=given,
            inplace=inplace,
            impl="triton",
        )
        out.loss.backward()

    def split() -> None:
        with mock.patch.object(logit_loss, "known_beforehand", lambda batch, spec: None):
            run(None, True)

    variants: Variants = {
        "triton on-policy": lambda: run(None, False),
        "triton on-policy in place": lambda: run(None, True),
        "triton on-policy in place, two kernels": split,
        "triton off-policy in place": lambda: run(old, True),
    }
    return variants | gpu_rivals.logit_losses(logits, targets, old, advantages)


def timed_table(
    variants: Variants,
    *,
    byte_count: int | Callable[[str], int] | None = None,
    flop_count: int | None = None,
    repeats: int = 7,
) -> dict[str, Any]:
    """Times, each as a share of what the bytes (by name of the variant, where they differ) or FLOPs
    that are needed would take at full rate."""
    gemm, copy = _rates()
    found = []
    for name, timing in interleave(variants, repeats=repeats).items():
        row = {"what": name} | timing.row()
        if timing.median is not None:
            moved = byte_count(name) if callable(byte_count) else byte_count
            work = {"flops": flop_count} if flop_count else {"bytes": moved}
            floor = flop_count / gemm if flop_count else moved / copy
            row |= work | {"share": 1e3 * floor / timing.median}
        found.append(row)
    return {"rows": found}
