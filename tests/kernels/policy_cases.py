"""A random batch, in the packed layout of the operators and in the padded one of other trainers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polymath_fast.kernels import PolicyLossSpec, policy_loss


@dataclass
class Case:
    """`lengths` (B,); padded tensors are (B, T), packed ones (N,); fp64."""

    lengths: Tensor
    trained: Tensor  # (B, T) 1.0 on trained tokens
    logprobs: Tensor  # (B, T), a leaf
    old: Tensor
    ref: Tensor
    sampling: Tensor
    entropy: Tensor  # (B, T), a leaf
    advantages: Tensor  # (B,)

    @property
    def inside(self) -> Tensor:
        """(B, T) bool: tokens that exist."""
        return torch.arange(self.trained.shape[1])[None] < self.lengths[:, None]

    def pack(self, padded: Tensor) -> Tensor:
        return padded[self.inside]

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).int()

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the packed operators."""
        return {
            "advantages": self.advantages,
            "cu_seqlens": self.cu_seqlens,
            "old_logprobs": self.pack(self.old),
            "ref_logprobs": self.pack(self.ref),
            "sampling_logprobs": self.pack(self.sampling),
            "mask": self.pack(self.trained).bool(),
        }


def make_case(seed: int = 0, spread: float = 0.4, completions: int = 7, longest: int = 9) -> Case:
    """Ragged completions with a few untrained tokens; ratios on both sides of every clip."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (completions, longest)
    lengths = torch.randint(1, longest + 1, (completions,), generator=generator)
    inside = torch.arange(longest)[None] < lengths[:, None]
    dropped = torch.rand(shape, generator=generator) < 0.15
    dropped[:, 0] = False  # every completion keeps a trained token
    logprobs = -normal(*shape).abs() - 0.05
    return Case(
        lengths=lengths,
        trained=(inside & ~dropped).double(),
        logprobs=logprobs.requires_grad_(),
        old=(logprobs.detach() + spread * normal(*shape)).clamp(max=-1e-3),
        ref=(logprobs.detach() + spread * normal(*shape)).clamp(max=-1e-3),
        sampling=(logprobs.detach() + spread * normal(*shape)).clamp(max=-1e-3),
        entropy=(normal(*shape).abs() + 0.1).requires_grad_(),
        advantages=normal(completions),
    )


def loss_and_gradient(case: Case, spec: PolicyLossSpec, **extra: Tensor) -> tuple[Tensor, Tensor]:
    inputs = {**case.inputs(), **extra}
    out = policy_loss(
        case.pack(case.logprobs), entropy=case.pack(case.entropy), spec=spec, **inputs
    )
    (gradient,) = torch.autograd.grad(out.loss, case.logprobs)
    return out.loss.detach(), gradient
