"""Runs of operators inside and outside of torch.compile, and what must be equal."""

from __future__ import annotations

from typing import Any

import torch
from heads import Head
from torch import Tensor

from polymath_fast.kernels import (
    PolicyLossSpec,
    grpo_loss,
    linear_grpo_loss,
    linear_logprobs,
    policy_loss,
    token_logprobs,
)

ROWS, VOCAB = 12, 70
OPERATORS = ("token_logprobs", "linear_logprobs", "grpo_loss", "linear_grpo_loss", "policy_loss")

SPECS = {
    "on-policy": (PolicyLossSpec(), ()),
    "kl and bonus": (
        PolicyLossSpec(loss_type="grpo", beta=0.1, entropy_coef=0.05, temperature=0.7),
        ("old_logprobs", "ref_logprobs"),
    ),
    "gspo": (PolicyLossSpec(loss_type="gspo"), ("old_logprobs", "mask")),
    "sequence weights": (
        PolicyLossSpec(importance_sampling_mode="sequence_mask"),
        ("old_logprobs", "sampling_logprobs"),
    ),
    "covariance": (PolicyLossSpec(loss_type="clip_cov", clip_cov_ratio=0.3), ("old_logprobs",)),
    "divisors": (PolicyLossSpec(normalizer=37.0), ("importance_weights",)),
}


def batch_of(count: int, names: tuple[str, ...] = ()) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(count)
    given = {name: -3 * torch.rand(count, generator=generator) for name in names}
    if "mask" in given:
        given["mask"] = torch.rand(count, generator=generator) > 0.2
    if "importance_weights" in given:
        given["importance_weights"] = torch.rand(count, generator=generator)
    ends = torch.tensor([0, count // 3, count], dtype=torch.int32)
    return given | {"advantages": torch.tensor([1.0, -0.5]), "cu_seqlens": ends}


def run(op: str, leaves: list[Tensor | None], targets: Tensor, **given: Any) -> dict[str, Tensor]:
    """Loss, results and metrics of an operator between other operations, as a model has them."""
    hidden, weight, bias = leaves
    hidden = torch.tanh(hidden)
    if op == "token_logprobs":
        logits = torch.nn.functional.linear(hidden, weight, bias)
        logprobs, entropy = token_logprobs(logits, targets, temperature=0.7)
        return {"loss": (logprobs * 0.3 + entropy.square()).sum()}
    if op == "linear_logprobs":
        logprobs, entropy = linear_logprobs(hidden, weight, targets, bias=bias, temperature=0.7)
        return {"loss": (logprobs * 0.3 + entropy.square()).sum()}
    if op == "linear_grpo_loss":
        out = linear_grpo_loss(hidden, weight, targets, bias=bias, **given)
    elif op == "grpo_loss":
        out = grpo_loss(torch.nn.functional.linear(hidden, weight, bias), targets, **given)
    else:
        log_p = torch.nn.functional.linear(hidden, weight, bias).float().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        out = policy_loss(log_p.gather(-1, targets[:, None])[:, 0], entropy=entropy, **given)
    return {"loss": out.loss, "logprobs": out.logprobs, "entropies": out.entropy} | out.metrics


def results(function: Any, op: str, head: Head, **given: Any) -> dict[str, Tensor]:
    """The same with the gradients of hidden, weight and bias."""
    leaves = head.leaves()
    found = function(op, leaves, head.targets, **given)
    found["loss"].backward()
    names = ("d_hidden", "d_weight", "d_bias")
    gradients = {n: leaf.grad for n, leaf in zip(names, leaves, strict=True) if leaf is not None}
    return {name: value.detach() for name, value in found.items()} | gradients


def assert_same_bits(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert list(ours) == list(plain)
    for name, value in plain.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name
