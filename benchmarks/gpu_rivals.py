"""What others' libraries have for a GPU alone, beside the variants of `rivals`: Liger and CCE.

A library that is not installed is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from benchmarks import rivals
from benchmarks.timing import Variants, late


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
    variants.pop("liger, eager", None)
    if find_spec("cut_cross_entropy"):
        variants["cce"] = late(lambda: _cce(data))
    if find_spec("liger_kernel"):
        variants["liger, scaled cross entropy"] = late(lambda: _liger_scaled(data))
        variants["liger, fused linear grpo"] = late(lambda: _liger_fused(data))
    return variants


def _cce(data: rivals.HeadData) -> Callable[[], None]:
    from cut_cross_entropy import linear_cross_entropy

    return _with_loss(
        data, lambda *leaves: -linear_cross_entropy(*leaves, data.targets, reduction="none")
    )


def _liger_scaled(data: rivals.HeadData) -> Callable[[], None]:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    def scaled_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        found = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, data.targets, 1.0)
        return -(found[0] if isinstance(found, tuple) else found)

    return _with_loss(data, scaled_cross_entropy)


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


def _with_loss(
    data: rivals.HeadData, logprobs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Callable[[], None]:
    """The clipped loss of somebody's log-probs, forward and backward."""

    def run() -> None:
        found = logprobs(*data.leaves())
        rivals.clipped(found, data.old_logprobs, data.per_token, len(found)).backward()

    return run
