"""Operator -> inputs, our variants, rivals, the check they must pass, and the work they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import rivals
from benchmarks.attention import prefix_attention_case
from benchmarks.case import (
    CHECKED_ROWS,
    Case,
    checked,
    logprob_error,
    relative_error,
)
from benchmarks.head_passes import (
    linear_grpo_loss_case,
    linear_grpo_loss_live_case,
    linear_logprobs_case,
)
from benchmarks.layer_passes import layer_rows_case
from benchmarks.optimizer_pass import flat_adamw_case
from benchmarks.weight_copies import weight_sync_case, weight_sync_fp32_case
from polymath_fast.kernels import (
    group_advantages,
    grpo_loss,
    policy_loss,
    token_logprobs,
)
from polymath_fast.precision import default_dtype


def token_logprobs_case(device: str) -> Case:
    logits, targets = _logits(device)

    def ours() -> object:
        with torch.no_grad():
            return token_logprobs(logits, targets)

    def check() -> dict[str, float]:
        found, _ = token_logprobs(logits[:CHECKED_ROWS], targets[:CHECKED_ROWS])
        exact = logits[:CHECKED_ROWS].double()
        return checked({"logprob": logprob_error(exact, targets[:CHECKED_ROWS], found)})

    return Case(
        shape={"N": len(logits), "V": logits.shape[1]},
        variants={"ours": ours, **rivals.token_logprobs(logits, targets)},
        baseline="torch.compile",
        check=check,
        bytes=float(logits.nbytes),
    )


def grpo_loss_case(device: str) -> Case:
    logits, targets = _logits(device)
    count = len(logits)
    advantages = torch.randn(count, device=device)
    offsets = torch.tensor([0, count], dtype=torch.int32, device=device)
    old = token_logprobs(logits, targets)[0] + 0.1 * torch.randn(count, device=device)

    def ours(inplace: bool) -> Callable[[], None]:
        # values after the first in-place run do not matter for time
        source = logits.clone() if inplace else logits
        anchor = torch.zeros((), requires_grad=True, device=device)

        def run() -> None:
            given = _Produced.apply(anchor, source)
            out = grpo_loss(given, targets, advantages, offsets, old_logprobs=old, inplace=inplace)
            out.loss.backward()

        return run

    def check() -> dict[str, float]:
        rows = slice(0, CHECKED_ROWS)
        leaf = logits[rows].detach().requires_grad_()
        wide = logits[rows].double().requires_grad_()
        some = (targets[rows], advantages[rows], torch.clamp(offsets, max=CHECKED_ROWS))
        out = grpo_loss(leaf, *some, old_logprobs=old[rows])
        out.loss.backward()
        logprobs = wide.log_softmax(-1).gather(-1, targets[rows, None])[:, 0]
        policy_loss(logprobs, *some[1:], old_logprobs=old[rows]).loss.backward()
        return checked(
            {
                "logprob": float((out.logprobs - logprobs).abs().max()),
                "d_logits": relative_error(leaf.grad, wide.grad),
            }
        )

    return Case(
        shape={"N": count, "V": logits.shape[1]},
        variants={
            "ours, in place": ours(True),
            "ours": ours(False),
            **rivals.logit_losses(logits, targets, old, advantages),
        },
        baseline="torch.compile",
        check=check,
        bytes=3.0 * logits.nbytes,
    )


def group_advantages_case(device: str) -> Case:
    rewards = torch.randint(0, 2, (1024,), device=device).float()
    variants = rivals.group_advantages(rewards, 128)

    def check() -> dict[str, float]:
        found = group_advantages(rewards, 128)
        return checked({"advantage": float((found - variants["eager"]()).abs().max())})

    ours = {"ours": lambda: group_advantages(rewards, 128)}
    return Case({"B": 1024, "G": 128}, ours | variants, "eager", check)


class _Produced(torch.autograd.Function):
    """Logits as a model hands them over: not a leaf, so their gradient need not be kept."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.new_zeros(()).float(), None


OPERATORS: dict[str, Callable[[str], Case]] = {
    "linear_grpo_loss": linear_grpo_loss_case,
    "linear_grpo_loss_live": linear_grpo_loss_live_case,
    "linear_logprobs": linear_logprobs_case,
    "grpo_loss": grpo_loss_case,
    "token_logprobs": token_logprobs_case,
    "group_advantages": group_advantages_case,
    "weight_sync": weight_sync_case,
    "weight_sync_fp32": weight_sync_fp32_case,
    "prefix_attention": prefix_attention_case,
    "flat_adamw": flat_adamw_case,
    "layer_rows": layer_rows_case,
}


def _logits(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    count, vocab = (8192, 151936) if device == "cuda" else (2048, 49152)
    logits = torch.empty(count, vocab, dtype=default_dtype(device), device=device).normal_(0, 3)
    return logits, torch.randint(vocab, (count,), device=device)
