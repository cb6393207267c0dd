"""Operator -> inputs, our variants, rivals, the check they must pass, and the work they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks import rivals
from benchmarks.attention import prefix_attention_case
from benchmarks.case import Case, relative_error
from benchmarks.layer_passes import layer_rows_case
from benchmarks.optimizer_pass import flat_adamw_case
from benchmarks.weight_copies import weight_sync_case, weight_sync_fp32_case
from polymath_fast.kernels import (
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logprobs,
    policy_loss,
    token_logprobs,
)
from polymath_fast.kernels.active_vocabulary import ROUNDING
from polymath_fast.precision import default_dtype

LOGPROB_ERROR = 1e-5
CHECKED_ROWS = 256


def linear_grpo_loss_case(device: str) -> Case:
    """A random head, as in the issue's yardstick: every column of the vocabulary matters."""
    return _head_case(_head(device, live=1.0), {"ours": 0.0})


def linear_grpo_loss_live_case(device: str) -> Case:
    """Rollouts of one prompt: all rows prefer the same 6 % of the vocabulary."""
    return _head_case(_head(device, live=0.06), {"ours, auto": "auto", "ours, exact": 0.0})


def linear_logprobs_case(device: str) -> Case:
    data = _head(device, live=1.0)

    def ours() -> object:
        with torch.no_grad():
            return linear_logprobs(data.hidden, data.weight, data.targets)

    def check() -> dict[str, float]:
        rows = slice(0, CHECKED_ROWS)
        exact = data.hidden[rows].double() @ data.weight.double().T
        found, _ = linear_logprobs(data.hidden[rows], data.weight, data.targets[rows])
        return _checked({"logprob": _logprob_error(exact, data.targets[rows], found)})

    count, size = data.hidden.shape
    vocab = data.weight.shape[0]
    return Case(
        shape={"N": count, "H": size, "V": vocab},
        variants={"ours": ours, **rivals.head_logprobs(data)},
        baseline="torch.compile, 8 chunks",
        check=check,
        flops=2.0 * count * size * vocab,
    )


def token_logprobs_case(device: str) -> Case:
    logits, targets = _logits(device)

    def ours() -> object:
        with torch.no_grad():
            return token_logprobs(logits, targets)

    def check() -> dict[str, float]:
        found, _ = token_logprobs(logits[:CHECKED_ROWS], targets[:CHECKED_ROWS])
        exact = logits[:CHECKED_ROWS].double()
        return _checked({"logprob": _logprob_error(exact, targets[:CHECKED_ROWS], found)})

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
        return _checked(
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
        return _checked({"advantage": float((found - variants["eager"]()).abs().max())})

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


def _head(device: str, live: float) -> rivals.HeadData:
    """N = 4096, SmolLM2's head on a CPU, Qwen2.5-1.5B's on a GPU; 32 completions. In the dtype that
    weights have there (`precision`)."""
    torch.manual_seed(0)
    size, vocab = (1536, 151936) if device == "cuda" else (576, 49152)
    hidden = torch.randn(4096, size, device=device)
    weight = torch.randn(vocab, size, device=device) * 0.05
    targets = torch.randint(int(vocab * live), (4096,), device=device)
    if live < 1:
        # a shared direction that lifts the live columns by about 14 nats over the others
        direction = torch.nn.functional.normalize(torch.randn(size, device=device), dim=0)
        hidden += 14 * direction
        weight[: int(vocab * live)] += direction
    hidden, weight = (tensor.to(default_dtype(device)) for tensor in (hidden, weight))
    with torch.no_grad():
        logprobs, _ = linear_logprobs(hidden, weight, targets)
    noise = 0.1 * torch.randn(4096, device=device)
    return rivals.HeadData(
        hidden, weight, targets, torch.randn(32, device=device), logprobs + noise
    )


def _logits(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    count, vocab = (8192, 151936) if device == "cuda" else (2048, 49152)
    logits = torch.empty(count, vocab, dtype=default_dtype(device), device=device).normal_(0, 3)
    return logits, torch.randint(vocab, (count,), device=device)


def _head_case(data: rivals.HeadData, ours: dict[str, float | str]) -> Case:
    count, size = data.hidden.shape
    vocab = data.weight.shape[0]
    offsets = torch.arange(0, count + 1, data.length, dtype=torch.int32, device=data.hidden.device)

    def run(tolerance: float | str) -> Callable[[], None]:
        def step() -> None:
            inputs = (*data.leaves(), data.targets, data.advantages, offsets)
            out = linear_grpo_loss(*inputs, old_logprobs=data.old_logprobs, vocab_tol=tolerance)
            out.loss.backward()

        return step

    variants = {name: run(tolerance) for name, tolerance in ours.items()}
    return Case(
        shape={"N": count, "H": size, "V": vocab},
        variants=variants | rivals.head_losses(data),
        baseline="torch.compile, 8 chunks",
        check=lambda: _check_head(data, list(ours.values())),
        flops=6.0 * count * size * vocab,
    )


def _check_head(data: rivals.HeadData, tolerances: list[float | str]) -> dict[str, float]:
    """Errors against fp64 on a part of the rows; gradients may be off as much as eager's are."""
    part = replace(
        data,
        hidden=data.hidden[:CHECKED_ROWS],
        targets=data.targets[:CHECKED_ROWS],
        advantages=data.advantages[: CHECKED_ROWS // data.length],
        old_logprobs=data.old_logprobs[:CHECKED_ROWS],
    )
    exact, d_hidden, d_weight = _eager(part, torch.float64)
    _, plain_hidden, plain_weight = _eager(part, data.hidden.dtype)
    offsets = torch.arange(0, CHECKED_ROWS + 1, data.length, dtype=torch.int32)
    inputs = (part.targets, part.advantages, offsets.to(data.hidden.device))
    errors = {
        "d_hidden of eager": relative_error(plain_hidden, d_hidden),
        "d_weight of eager": relative_error(plain_weight, d_weight),
    }
    for tolerance in tolerances:
        hidden, weight = part.leaves()
        out = linear_grpo_loss(
            hidden, weight, *inputs, old_logprobs=part.old_logprobs, vocab_tol=tolerance
        )
        out.loss.backward()
        errors |= {
            f"logprob, {tolerance}": float((out.logprobs - exact).abs().max()),
            f"d_hidden, {tolerance}": relative_error(hidden.grad, d_hidden),
            f"d_weight, {tolerance}": relative_error(weight.grad, d_weight),
        }
        extra = ROUNDING if tolerance == "auto" else 0.0
        for name in ("d_hidden", "d_weight"):
            limit = 1.05 * max(errors[f"{name} of eager"], ROUNDING) + extra
            _require(f"{name}, {tolerance}", errors[f"{name}, {tolerance}"], limit)
        _require(f"logprob, {tolerance}", errors[f"logprob, {tolerance}"], LOGPROB_ERROR)
        if tolerance == "auto":
            errors["columns kept"] = float(out.metrics["vocab/live_share"])
    return errors


def _eager(
    data: rivals.HeadData, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs and the gradients of hidden and weight, as a user would get them in `dtype`."""
    hidden, weight = (leaf.detach().to(dtype).requires_grad_() for leaf in data.leaves())
    logits = torch.nn.functional.linear(hidden, weight)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logprobs = logits.to(wide).log_softmax(-1).gather(-1, data.targets[:, None])[:, 0]
    loss = rivals.clipped(logprobs, data.old_logprobs, data.per_token, len(data.targets))
    loss.backward()
    return logprobs.detach(), hidden.grad, weight.grad


def _require(name: str, error: float, limit: float) -> None:
    assert error <= limit, f"{name}: error {error:.2e} is above {limit:.1e}; nothing was timed"


def _checked(errors: dict[str, float]) -> dict[str, float]:
    for name, error in errors.items():
        _require(name, error, ROUNDING if name.startswith("d_") else LOGPROB_ERROR)
    return errors


def _logprob_error(exact: torch.Tensor, targets: torch.Tensor, found: torch.Tensor) -> float:
    truth = exact.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return float((found - truth).abs().max())
