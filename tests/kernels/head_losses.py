"""Inputs of `linear_grpo_loss`, and a run of it with its gradients."""

from __future__ import annotations

import torch
from heads import Head, plain_logprobs
from torch import Tensor

from polymath_fast.kernels import PolicyLossSpec, linear_grpo_loss

PLAIN = PolicyLossSpec()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def loss_inputs(
    head: Head, spec: PolicyLossSpec = PLAIN, completions: int = 3, seed: int = 1
) -> dict[str, Tensor]:
    """Ragged completions (one empty), ratios off 1, a reference, a mask."""
    count = len(head.targets)
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, count + 1, (completions,), generator=generator).sort().values
    offsets = torch.cat([torch.tensor([0, 0]), cuts, torch.tensor([count])]).int()
    leaves = [None if t is None else t.double() for t in (head.hidden, head.weight, head.bias)]
    logprobs, _ = plain_logprobs(*leaves, head.targets, spec.temperature)

    def near() -> Tensor:
        noise = torch.randn(count, generator=generator, dtype=torch.float64)
        return (logprobs + 0.3 * noise).float()

    return {
        "advantages": torch.randn(len(offsets) - 1, generator=generator),
        "cu_seqlens": offsets,
        "old_logprobs": near(),
        "ref_logprobs": near(),
        "mask": torch.rand(count, generator=generator) > 0.2,
    }


SPECS = {
    "dapo": PolicyLossSpec(),
    "everything": PolicyLossSpec(
        loss_type="grpo", beta=0.1, entropy_coef=0.02, temperature=0.7, clip_ratio_c=3.0
    ),
    "gspo": PolicyLossSpec(loss_type="gspo", beta=0.1),
    "top entropy": PolicyLossSpec(top_entropy_quantile=0.5, entropy_coef=0.02),
    "clip_cov": PolicyLossSpec(loss_type="clip_cov", clip_cov_ratio=0.2, clip_cov_lb=0.1),
}


def run(head: Head, spec: PolicyLossSpec, inputs: dict, **options: object) -> tuple:
    leaves = head.leaves()
    out = linear_grpo_loss(
        leaves[0], leaves[1], head.targets, bias=leaves[2], spec=spec, **inputs, **options
    )
    (out.loss * 2).backward()
    return out, [leaf.grad / 2 for leaf in leaves if leaf is not None]
