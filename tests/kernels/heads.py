"""Random LM heads, and what plain PyTorch makes of them in fp64 and in the dtype of the inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polymath_fast.kernels import PolicyLossSpec, policy_loss


@dataclass
class Head:
    """hidden (N, H), weight (V, H), bias (V,) or None, in one dtype; targets (N,)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor | None]:
        """Fresh hidden, weight and bias that require gradients."""
        return [
            None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
            for t in (self.hidden, self.weight, self.bias)
        ]


def make_head(
    rows: int,
    size: int,
    vocab: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    spread: float = 7.0,
    bias: bool = False,
    seed: int = 0,
) -> Head:
    """Logits with standard deviation `spread`; every other target is a likely token."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, size, generator=generator).to(dtype)
    weight = (torch.randn(vocab, size, generator=generator) * spread / size**0.5).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=generator)
    if rows:
        targets[::2] = (hidden.double() @ weight.double().T)[::2].argmax(-1)
    extra = torch.randn(vocab, generator=generator).to(dtype) if bias else None
    return Head(hidden, weight, extra, targets)


def plain_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies as a user would write them."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_p = (logits.to(wide) / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def plain_loss(
    head: Head, dtype: torch.dtype, spec: PolicyLossSpec, **inputs: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of hidden, weight and bias through `plain_logprobs` in `dtype`."""
    leaves = head.leaves(dtype)
    logprobs, entropy = plain_logprobs(*leaves, head.targets, spec.temperature)
    out = policy_loss(logprobs, entropy=entropy, spec=spec, **inputs)
    present = [leaf for leaf in leaves if leaf is not None]
    return out.loss.detach(), list(torch.autograd.grad(out.loss, present))
