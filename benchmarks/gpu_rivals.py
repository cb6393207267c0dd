"""The same results by others' code: eager PyTorch, torch.compile, Liger, CCE and TRL.

Each function returns variants by name; a library that is not installed is left out of them. Every
variant computes on-policy DAPO with one advantage a token, forward and backward, unless it says so.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F

Variants = dict[str, Callable[[], object]]
EAGER_LIMIT = 2**31
"""logits beyond which eager variants would need more memory than they are worth waiting for"""


def logprobs_from_logits(logits: torch.Tensor, targets: torch.Tensor) -> Variants:
    """Log-probs and entropies, no gradient."""

    def eager() -> tuple[torch.Tensor, torch.Tensor]:
        log_p = logits.float().log_softmax(-1)
        chosen = log_p.gather(-1, targets[:, None])[:, 0]
        return chosen, -(log_p.exp() * log_p).sum(-1)

    variants: Variants = {"eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    if find_spec("liger_kernel"):
        from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

        padded = F.pad(logits, (0, 0, 0, 1))[None]
        variants["liger (no entropy)"] = lambda: fused_selective_log_softmax(
            padded, targets[None], 1.0
        )
    return variants


def loss_from_logits(
    logits: torch.Tensor, targets: torch.Tensor, advantages: torch.Tensor, lengths: int
) -> Variants:
    """Loss and gradient of logits; `lengths`: tokens a completion, for padded interfaces."""

    def eager(leaf: torch.Tensor) -> None:
        chosen = leaf.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        ratio = (chosen - chosen.detach()).exp()
        loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        loss.backward()

    compiled = torch.compile(eager, dynamic=False)

    def fresh(step: Callable[[torch.Tensor], None]) -> Callable[[], None]:
        return lambda: step(logits.detach().requires_grad_())

    variants: Variants = {"eager": fresh(eager), "torch.compile": fresh(compiled)}
    if find_spec("liger_kernel"):
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        batch = len(targets) // lengths
        padded = F.pad(logits.view(batch, lengths, -1), (0, 0, 0, 1))
        ids = targets.view(batch, lengths)
        per_completion = advantages.view(batch, lengths)[:, 0].contiguous()

        def liger() -> None:
            leaf = padded.detach().requires_grad_()
            # in place, as its users run it: values after the first call do not matter for time
            loss, *_ = triton_grpo_loss(
                leaf, None, None, ids, per_completion, temperature=1.0, beta=0.0, reduce=False
            )
            loss.sum().backward()

        variants["liger in place"] = liger
    return variants


def loss_from_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    advantages: torch.Tensor,
    lengths: int,
) -> Variants:
    """Loss and gradients of hidden states and LM head."""

    def finish(chosen: torch.Tensor) -> None:
        ratio = (chosen - chosen.detach()).exp()
        loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        loss.backward()

    def leaves() -> tuple[torch.Tensor, torch.Tensor]:
        return hidden.detach().requires_grad_(), weight.detach().requires_grad_()

    def logits_loss(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        logits = F.linear(states, head).float()
        return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    variants: Variants = {}
    if len(targets) * len(weight) <= EAGER_LIMIT:
        compiled = torch.compile(logits_loss, dynamic=False)
        variants["eager"] = lambda: finish(logits_loss(*leaves()))
        variants["torch.compile"] = lambda: finish(compiled(*leaves()))
    if find_spec("trl"):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        def trl() -> None:
            states, head = leaves()
            found = ChunkedLogProbFunction.apply(
                states, head, None, targets, 1.0, 32768, None, 1.0, ("entropy",)
            )
            finish(found[0])

        variants["trl chunked"] = trl
    if find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        variants["cce"] = lambda: finish(
            -linear_cross_entropy(*leaves(), targets, reduction="none", impl="cce")
        )
    if find_spec("liger_kernel"):
        variants |= _liger_heads(leaves, finish, targets, advantages, lengths)
    return variants


def _liger_heads(
    leaves: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    finish: Callable[[torch.Tensor], None],
    targets: torch.Tensor,
    advantages: torch.Tensor,
    lengths: int,
) -> Variants:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    batch = len(targets) // lengths
    per_completion = advantages.view(batch, lengths)[:, 0].contiguous()
    ids = targets.view(batch, lengths)
    fused = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)

    def scaled_cross_entropy() -> None:
        found = LigerFusedLinearScaledCrossEntropyFunction.apply(*leaves(), targets, 1.0)
        finish(-(found[0] if isinstance(found, tuple) else found))

    def chunked_loss() -> None:
        states, head = leaves()
        states = states.view(batch, lengths, -1)
        loss, _ = fused(states, head, ids, torch.ones_like(ids), per_completion)
        loss.backward()

    return {
        "liger scaled cross entropy": scaled_cross_entropy,
        "liger fused linear grpo": chunked_loss,
    }
