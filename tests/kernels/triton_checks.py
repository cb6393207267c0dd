"""What the Triton implementations must fulfil, on any device: truth is the reference in float64.

Shared by the files that run it in Triton's interpreter and on a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from polymath_fast.kernels.policy_loss import (
    PolicyLossOutput,
    PolicyLossSpec,
    differentiable_loss,
    prepare,
)
from polymath_fast.kernels.token_logprobs.reference import token_logprobs
from polymath_fast.kernels.triton.products import product

LOGPROB_ERROR = 1e-5
"""of log-probs and entropies, absolute, logits within +-30"""
OF_TORCH = 2.0
"""or, of a head in half precision, that many times what torch's product with an fp32 result is off
by: Hopper cuts a sum off to 24 bits after every 16 products (arXiv 2512.07004), which for H = 576
and logits of 20 moves entropies by 1.4e-5"""
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-19}
"""of a gradient, relative to its norm, on top of what eager PyTorch is allowed"""
TRUNCATION = 2.0**-7
"""the same for bf16 in Triton's interpreter, which cuts digits off where a GPU rounds"""
INPUTS = {
    "token_logprobs": ("logits", "targets"),
    "grpo_loss": ("logits", "targets"),
    "linear_logprobs": ("hidden", "weight", "targets", "bias"),
    "linear_grpo_loss": ("hidden", "weight", "targets", "bias"),
}

Tensors = dict[str, torch.Tensor | None]


@dataclass
class Result:
    """What an operator returned, and gradients by its float inputs."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    gradients: Tensors
    output: PolicyLossOutput | None = None


def make_logits(count: int, vocab: int, dtype: torch.dtype, device: str) -> Tensors:
    """Logits within +-30, half of the rows peaked at their target, as a model's are."""
    generator = torch.Generator().manual_seed(count * 7 + vocab)
    logits = torch.randn(count, vocab, generator=generator) * 5
    targets = torch.randint(vocab, (count,), generator=generator)
    rows = torch.arange(0, count, 2)
    logits[rows, targets[rows]] = 22.0
    logits = logits.clamp(-30, 30).to(dtype)
    return {"logits": logits.to(device), "targets": targets.to(device)}


def make_head(
    count: int, vocab: int, depth: int, dtype: torch.dtype, device: str, bias: bool = False
) -> Tensors:
    """An LM head with one frequent target, half of the rows peaked at theirs."""
    generator = torch.Generator().manual_seed(count * 7 + vocab + depth)
    hidden = torch.randn(count, depth, generator=generator)
    weight = torch.randn(vocab, depth, generator=generator) * 3 / depth**0.5
    targets = torch.randint(vocab, (count,), generator=generator)
    targets[: count // 3] = 7
    rows = torch.arange(1, count, 2)
    hidden[rows] += weight[targets[rows]]
    shift = torch.randn(vocab, generator=generator) if bias else None
    tensors = {"hidden": hidden, "weight": weight, "bias": shift}
    cast = {n: None if t is None else t.to(dtype).to(device) for n, t in tensors.items()}
    return cast | {"targets": targets.to(device)}


def make_batch(count: int, device: str, *names: str) -> Tensors:
    """Completions of unlike lengths, one empty, a third masked; `names` are optional log-probs."""
    generator = torch.Generator().manual_seed(count)
    cuts = torch.tensor([0, count // 3, count // 3, count - count // 4, count], dtype=torch.int32)
    batch = {
        "advantages": torch.tensor([1.0, 0.5, -1.3, 0.0]),
        "cu_seqlens": cuts,
        "mask": torch.rand(count, generator=generator) > 0.3,
    }
    batch |= {name: -4 * torch.rand(count, generator=generator) for name in names}
    return {n: t.to(device) for n, t in batch.items()}


def doubled(tensors: Tensors) -> Tensors:
    """The same numbers in float64."""
    return {
        n: t.double() if t is not None and t.is_floating_point() else t for n, t in tensors.items()
    }


def logprobs_result(
    op: str, name: str, tensors: Tensors, g: torch.Tensor, g_entropy: torch.Tensor | None
) -> Result:
    """`op` of `name` ("_triton", "reference", "eager" or "product") at temperature 0.7, and
    gradients; "product" has none, and fp32 logits."""
    leaves, values = _leaves(op, tensors)
    if name in _LOGITS:
        logprobs, entropy = token_logprobs(_LOGITS[name](leaves), tensors["targets"], 0.7)
    else:
        logprobs, entropy = _function(op, name)(*values, 0.7)
    total = (logprobs * g.to(logprobs)).sum()
    if g_entropy is not None:
        total = total + (entropy * g_entropy.to(entropy)).sum()
    total.backward()
    return Result(logprobs.detach(), entropy.detach(), _gradients(leaves))


def loss_result(
    op: str,
    name: str,
    tensors: Tensors,
    batch: Tensors,
    spec: PolicyLossSpec,
    vocab_tol: float | str = 0.0,
) -> Result:
    """`op` of `name`, and gradients of 3 * loss."""
    leaves, values = _leaves(op, tensors)
    count, dtype = len(values[0]), values[0].dtype
    given = {n: t for n, t in batch.items() if n not in ("advantages", "cu_seqlens")}
    prepared = prepare(
        spec,
        count,
        torch.float64 if dtype == torch.float64 else torch.float32,
        values[0].device,
        batch["advantages"],
        batch["cu_seqlens"],
        **given,
    )
    if name in _LOGITS:
        found = token_logprobs(_LOGITS[name](leaves), tensors["targets"], spec.temperature)
        out = differentiable_loss(prepared, *found, spec)
    else:
        option = {"inplace": False} if op == "grpo_loss" else {"vocab_tol": vocab_tol}
        out = _function(op, name)(*values, prepared, spec, **option)
    (3 * out.loss).backward()
    return Result(out.logprobs, out.entropy, _gradients(leaves), out)


def compare(run: Callable[[str, Tensors], Result], tensors: Tensors, dtype: torch.dtype) -> None:
    """Triton against the reference in float64; gradients may err twice as much as eager PyTorch."""
    ours, truth = run("_triton", tensors), run("reference", doubled(tensors))
    assert ours.logprobs.dtype == ours.entropy.dtype == torch.float32
    assert not (ours.logprobs > 0).any()
    single = truth if dtype == torch.float32 or "hidden" not in tensors else run("product", tensors)
    for what in ("logprobs", "entropy"):
        mine, other, exact = (getattr(result, what) for result in (ours, single, truth))
        allowed = max(LOGPROB_ERROR, OF_TORCH * float((other.double() - exact).abs().max()))
        torch.testing.assert_close(mine.double(), exact, rtol=1e-6, atol=allowed)
    if ours.output is not None:
        assert_same_output(ours.output, truth.output)
    rivals = run("eager", tensors).gradients
    for name, exact in truth.gradients.items():
        mine, size = ours.gradients[name], exact.norm()
        assert mine.shape == exact.shape and mine.dtype == dtype
        error = (mine.double() - exact).norm()
        rounding = ROUNDING[dtype]
        if dtype == torch.bfloat16 and not mine.is_cuda:
            rounding = TRUNCATION
        allowed = 2 * (rivals[name].double() - exact).norm() + rounding * size
        assert error <= allowed, f"{name}: error {error:.2e} > {allowed:.2e}, size {size:.2e}"


def assert_same_output(ours: PolicyLossOutput, truth: PolicyLossOutput) -> None:
    """Loss and metrics."""
    torch.testing.assert_close(
        ours.loss.detach().double(), truth.loss.detach(), rtol=1e-4, atol=1e-6
    )
    assert ours.metrics.keys() == truth.metrics.keys()
    for name, exact in truth.metrics.items():
        torch.testing.assert_close(
            ours.metrics[name].double(), exact.double(), rtol=1e-4, atol=1e-4, msg=name
        )


def _function(op: str, name: str) -> Any:
    return getattr(importlib.import_module(f"polymath_fast.kernels.{op}.{name}"), op)


def _leaves(op: str, tensors: Tensors) -> tuple[Tensors, list[torch.Tensor | None]]:
    """Copies that want gradients, and the inputs of `op` in order."""
    leaves = {
        n: t.detach().requires_grad_()
        for n, t in tensors.items()
        if t is not None and t.is_floating_point()
    }
    return leaves, [leaves.get(n, tensors.get(n)) for n in INPUTS[op]]


def _eager_logits(leaves: Tensors) -> torch.Tensor:
    """Logits rounded to the dtype of the inputs, as a model hands them out."""
    if "logits" in leaves:
        return leaves["logits"]
    return torch.nn.functional.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))


def _single_logits(leaves: Tensors) -> torch.Tensor:
    """fp32, in one product of the inputs as they are."""
    hidden, weight, bias = (leaves.get(name) for name in ("hidden", "weight", "bias"))
    with torch.no_grad():
        logits = torch.empty(len(hidden), len(weight), device=hidden.device)
        product(hidden, weight.T, logits)
        if bias is not None:
            logits += bias
    return logits.requires_grad_()


_LOGITS = {"eager": _eager_logits, "product": _single_logits}


def _gradients(leaves: Tensors) -> Tensors:
    return {n: t.grad for n, t in leaves.items()}
