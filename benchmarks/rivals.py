"""The same results by others' code on a CPU: eager PyTorch, torch.compile, Liger, TRL, CCE, verl.

Each function returns variants by name; a library that is not installed is left out of them. Losses
are the clipped one with old log-probs given, forward and backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType

import torch
import torch.nn.functional as F

from benchmarks.timing import Variants, late

CHUNKS = 8
"""pieces in which a careful user would run the head through torch.compile"""

Head = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""hidden (N, H) and weight (V, H) -> log-probs (N,)"""


@dataclass
class HeadData:
    """N tokens in completions of one length, as padded interfaces want them."""

    hidden: torch.Tensor  # (N, H)
    weight: torch.Tensor  # (V, H)
    targets: torch.Tensor  # (N,)
    advantages: torch.Tensor  # (B,)
    old_logprobs: torch.Tensor  # (N,)

    @property
    def length(self) -> int:
        """Tokens a completion."""
        return len(self.targets) // len(self.advantages)

    @property
    def per_token(self) -> torch.Tensor:
        """(N,) advantages."""
        return self.advantages.repeat_interleave(self.length)

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden and weight, fresh, requiring gradients."""
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()


def clipped(
    logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, count: int
) -> torch.Tensor:
    """Share of the tokens given in the mean over `count`."""
    ratio = (logprobs - old).exp()
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum() / count


def chosen_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(N,) as most trainers write it."""
    return logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def head_losses(data: HeadData) -> Variants:
    """Loss and gradients of hidden states and LM head."""
    count = len(data.targets)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        logprobs = chosen_logprobs(F.linear(hidden[rows], weight), data.targets[rows])
        return clipped(logprobs, data.old_logprobs[rows], data.per_token[rows], count)

    def chunked(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        step = -(-count // CHUNKS)
        return sum(loss(hidden, weight, slice(i, i + step)) for i in range(0, count, step))

    compiled = torch.compile(chunked, dynamic=False)
    variants: Variants = {
        "torch.compile, 8 chunks": lambda: compiled(*data.leaves()).backward(),
        "eager": lambda: loss(*data.leaves(), slice(None)).backward(),
    }
    if find_spec("liger_kernel"):
        variants["liger, eager"] = late(lambda: _liger(data))
    return variants | with_loss(data, fused_heads(data.targets))


def head_logprobs(data: HeadData) -> Variants:
    """Log-probs from the head, no gradient."""

    def chunked(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        step = -(-len(hidden) // CHUNKS)
        pieces = zip(hidden.split(step), data.targets.split(step), strict=True)
        return torch.cat([chosen_logprobs(F.linear(some, weight), ids) for some, ids in pieces])

    compiled = torch.compile(chunked, dynamic=False)
    heads: dict[str, Head] = {
        "torch.compile, 8 chunks": compiled,
        "eager": lambda *inputs: chosen_logprobs(F.linear(*inputs), data.targets),
    }
    return forward_alone(data, heads | fused_heads(data.targets))


def fused_heads(targets: torch.Tensor) -> dict[str, Head]:
    """Log-probs that can be differentiated; TRL's and verl's take the entropies on the way."""
    heads: dict[str, Head] = {}
    if find_spec("trl"):
        heads["trl chunked"] = late(lambda: _trl(targets))
    if find_spec("cut_cross_entropy"):
        heads["cce, torch.compile"] = late(lambda: cce(targets, impl="torch_compile"))
    if find_spec("verl"):
        heads["verl chunked"] = late(lambda: _verl(targets))
    return heads


def with_loss(data: HeadData, heads: dict[str, Head]) -> Variants:
    """The clipped loss of each one's log-probs, forward and backward."""

    def run(head: Head) -> None:
        loss = clipped(head(*data.leaves()), data.old_logprobs, data.per_token, len(data.targets))
        loss.backward()

    return {name: partial(run, head) for name, head in heads.items()}


def forward_alone(data: HeadData, heads: dict[str, Head]) -> Variants:
    """Each one's log-probs, no gradient."""
    return _without_grad(
        {name: partial(head, data.hidden, data.weight) for name, head in heads.items()}
    )


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> Variants:
    """Log-probs and entropies from logits, no gradient."""

    def eager() -> tuple[torch.Tensor, torch.Tensor]:
        log_p = logits.float().log_softmax(-1)
        return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    variants: Variants = {"torch.compile": torch.compile(eager, dynamic=False), "eager": eager}
    if find_spec("trl"):
        variants["trl, no entropy"] = late(lambda: _trl_logprobs(logits, targets))
    return _without_grad(variants)


def _trl_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> Callable[[], object]:
    from trl.trainer.utils import selective_log_softmax

    # it takes one sequence after the other
    return lambda: selective_log_softmax(logits[None], targets[None])


def logit_losses(
    logits: torch.Tensor, targets: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor
) -> Variants:
    """Loss and gradient of logits."""

    def loss(leaf: torch.Tensor) -> torch.Tensor:
        return clipped(chosen_logprobs(leaf, targets), old, advantages, len(targets))

    compiled = torch.compile(loss, dynamic=False)

    def run(some: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        return lambda: some(logits.detach().requires_grad_()).backward()

    return {"torch.compile": run(compiled), "eager": run(loss)}


def group_advantages(rewards: torch.Tensor, size: int) -> Variants:
    """TRL's lines."""

    def eager() -> torch.Tensor:
        grouped = rewards.view(-1, size)
        mean = grouped.mean(1).repeat_interleave(size)
        std = grouped.std(1).repeat_interleave(size)
        return (rewards - mean) / (std + 1e-4)

    return {"eager": eager}


def _liger(data: HeadData) -> Callable[[], None]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    fused = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, loss_type="dapo"
    )
    shape = (len(data.advantages), data.length)
    mask = torch.ones(shape, dtype=torch.long, device=data.hidden.device)

    def run() -> None:
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

    return run


def _trl(targets: torch.Tensor) -> Head:
    from trl.kernels import ChunkedLogProbFunction

    # as its trainers call it
    options = (1.0, 32768, None, 1.0, ("entropy",))
    return lambda *leaves: ChunkedLogProbFunction.apply(*leaves, None, targets, *options)[0]


def cce(targets: torch.Tensor, **options: object) -> Head:
    """Of cut-cross-entropy; `options` are those of its `linear_cross_entropy`."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda *leaves: -linear_cross_entropy(*leaves, targets, reduction="none", **options)


def _verl(targets: torch.Tensor) -> Head:
    fused = verl_module("experimental.torch_functional").FusedLinearForPPO()
    return lambda *leaves: fused(*leaves, targets)[0]


def verl_module(name: str) -> ModuleType:
    """One of `verl.utils`, by itself: importing verl takes ray, tensordict and what they need,
    which its heads do not use."""
    for package in ("verl", "verl.utils"):
        if package not in sys.modules:
            sys.modules[package] = module_from_spec(find_spec(package))
    return import_module(f"verl.utils.{name}")


def _without_grad(variants: Variants) -> Variants:
    return {name: torch.no_grad()(variant) for name, variant in variants.items()}
