"""Losses and upstream gradients that the files of `test_triton_interpreter.py` share.

Small, and so are the tiles: awkward shapes have whole tiles, tails and more than one of each.
"""

from __future__ import annotations

import pytest
import torch

from polymath_fast.kernels.grpo_loss._triton import grpo_loss
from polymath_fast.kernels.linear_grpo_loss._triton import linear_grpo_loss
from polymath_fast.kernels.policy_loss import PolicyLossSpec, prepare

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

SPECS = [
    pytest.param(PolicyLossSpec(), (), id="on-policy"),
    pytest.param(PolicyLossSpec(entropy_coef=0.1, temperature=0.7), (), id="entropy-bonus"),
    pytest.param(
        PolicyLossSpec(loss_type="grpo", beta=0.1), ("old_logprobs", "ref_logprobs"), id="kl"
    ),
    pytest.param(PolicyLossSpec(loss_type="gspo"), ("old_logprobs",), id="sequence-ratio"),
    pytest.param(PolicyLossSpec(loss_type="gspo"), (), id="sequence-ratio-on-policy"),
    pytest.param(PolicyLossSpec(top_entropy_quantile=0.5), ("old_logprobs",), id="whole-batch"),
    pytest.param(PolicyLossSpec(loss_type="sapo"), ("old_logprobs",), id="sapo"),
    pytest.param(
        PolicyLossSpec(loss_type="clip_cov", clip_cov_ratio=0.4, clip_cov_ub=50.0),
        (),
        id="covariance-on-policy",
    ),
]


def upstream(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, count, generator=torch.Generator().manual_seed(1)).unbind()


def prepared_batch(count: int, spec: PolicyLossSpec, mask: torch.Tensor | None = None, **given):
    ends = torch.tensor([0, count // 2, count], dtype=torch.int32)
    advantages = torch.tensor([1.0, -0.7])
    return prepare(spec, count, FP32, torch.device("cpu"), advantages, ends, mask=mask, **given)


def rows_loss(logits, targets, inplace=False, **options):
    spec = PolicyLossSpec(**options)
    return grpo_loss(logits, targets, prepared_batch(len(targets), spec), spec, inplace)


def head_loss(hidden, weight, targets, mask=None, **options):
    spec = PolicyLossSpec(**options)
    batch = prepared_batch(len(targets), spec, mask)
    return linear_grpo_loss(hidden, weight, targets, None, batch, spec, 0.0)
