"""What others' libraries have for a GPU alone, beside `rivals`: Liger, CCE and verl.

A library that is not installed is left out. "cce" computes the whole gradient, as all others do. By
default CCE skips each tile of it where softmax - onehot stays below 2^-12 (`filter_eps`, in bf16),
which hardly one of 150,000 tokens reaches where the model is unsure: a variant that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from benchmarks import rivals
from benchmarks.timing import Variants, late

FOR_CPUS = ("liger, eager", "cce, torch.compile")
"""of `rivals`: their libraries have kernels"""
CCE_FILTERED = "cce, small gradients dropped"


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> Variants:
    """Log-probs and entropies from logits, no gradient."""
    variants = rivals.token_logprobs(logits, targets)
    if find_spec("liger_kernel"):
        variants["liger, no entropy"] = late(lambda: _liger_logprobs(logits, targets))
    return variants


def _liger_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> Callable[[], object]:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    padded = F.pad(logits, (0, 0, 0, 1))[None]
    return lambda: fused_selective_log_softmax(padded, targets[None], 1.0)


def logit_losses(
    logits: torch.Tensor, targets: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor
) -> Variants:
    """Loss and gradient of logits; advantages (B,), completions of one length."""
    length = len(targets) // len(advantages)
    variants = rivals.logit_losses(logits, targets, old, advantages.repeat_interleave(length))
    if find_spec("liger_kernel"):
        variants["liger, in place"] = late(lambda: _liger_loss(logits, targets, old, advantages))
    return variants


def _liger_loss(
    logits: torch.Tensor, targets: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor
) -> Callable[[], None]:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    shape = (len(advantages), len(targets) // len(advantages))
    padded = F.pad(logits.view(*shape, -1), (0, 0, 0, 1))
    ids, old = targets.view(shape), old.view(shape)

    def run() -> None:
        # in place, as its users run it: values after the first call do not matter for time
        leaf = padded.detach().requires_grad_()
        losses, *_ = triton_grpo_loss(
            leaf, old, None, ids, advantages, temperature=1.0, beta=0.0, reduce=False
        )
        losses.sum().backward()

    return run


def head_losses(data: rivals.HeadData) -> Variants:
    """Loss and gradients of hidden states and LM head."""
    variants = rivals.head_losses(data)
    for name in FOR_CPUS:
        variants.pop(name, None)
    heads = _kernels(data.targets)
    if find_spec("cut_cross_entropy"):
        heads[CCE_FILTERED] = late(lambda: rivals.cce(data.targets))
    if find_spec("liger_kernel"):
        variants["liger, fused linear grpo"] = late(lambda: _liger_fused(data))
    return variants | rivals.with_loss(data, heads)


def head_logprobs(data: rivals.HeadData) -> Variants:
    """Log-probs from the head, no gradient."""
    variants = rivals.head_logprobs(data)
    for name in FOR_CPUS:
        variants.pop(name, None)
    return variants | rivals.forward_alone(data, _kernels(data.targets))


def fused_heads(targets: torch.Tensor) -> dict[str, rivals.Head]:
    """Log-probs that can be differentiated; but CCE's and Liger's all take the entropies, too."""
    heads = rivals.fused_heads(targets) | _kernels(targets)
    return {name: head for name, head in heads.items() if name not in FOR_CPUS}


def _kernels(targets: torch.Tensor) -> dict[str, rivals.Head]:
    heads: dict[str, rivals.Head] = {}
    if find_spec("cut_cross_entropy"):
        heads["cce"] = late(lambda: rivals.cce(targets, filter_eps=None))
    if find_spec("liger_kernel"):
        heads["liger, scaled cross entropy"] = late(lambda: _liger_scaled(targets))
    if find_spec("verl"):
        heads["verl kernels"] = late(lambda: _verl(targets))
    return heads


def _verl(targets: torch.Tensor) -> rivals.Head:
    fused = rivals.verl_module("kernel.linear_cross_entropy").linear_cross_entropy
    return lambda *leaves: fused(*leaves, targets)[0]


def _liger_scaled(targets: torch.Tensor) -> rivals.Head:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    def scaled_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        found = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets, 1.0)
        return -(found[0] if isinstance(found, tuple) else found)

    return scaled_cross_entropy


def _liger_fused(data: rivals.HeadData) -> Callable[[], None]:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    shape = (len(data.advantages), data.length)
    mask = torch.ones(shape, dtype=torch.long, device=data.hidden.device)
    fused = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)

    def chunked() -> None:
        hidden, weight = data.leaves()
        loss, _ = fused(
            hidden.view(*shape, -1),
            weight,
            data.targets.view(shape),
            mask,
            data.advantages,
            old_per_token_logps=data.old_logprobs.view(shape),
        )
        loss.backward()

    return chunked
