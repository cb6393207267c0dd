"""The cases of linear_grpo_loss and linear_logprobs for `registry`, on one random LM head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch

from benchmarks import gpu_rivals, rivals
from benchmarks.case import (
    CHECKED_ROWS,
    LOGPROB_ERROR,
    Case,
    checked,
    logprob_error,
    relative_error,
    require,
)
from polymath_fast.kernels import linear_grpo_loss, linear_logprobs
from polymath_fast.kernels.active_vocabulary import ROUNDING
from polymath_fast.precision import default_dtype


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
        return checked({"logprob": logprob_error(exact, data.targets[rows], found)})

    count, size = data.hidden.shape
    vocab = data.weight.shape[0]
    return Case(
        shape={"N": count, "H": size, "V": vocab},
        variants={"ours": ours, **_others(data).head_logprobs(data)},
        baseline="torch.compile, 8 chunks",
        check=check,
        flops=2.0 * count * size * vocab,
    )


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


def _others(data: rivals.HeadData) -> ModuleType:
    return gpu_rivals if data.hidden.is_cuda else rivals


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
        variants=variants | _others(data).head_losses(data),
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
            require(f"{name}, {tolerance}", errors[f"{name}, {tolerance}"], limit)
        require(f"logprob, {tolerance}", errors[f"logprob, {tolerance}"], LOGPROB_ERROR)
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
