"""AdamW over flat buffers: live weights in the model's dtype, everything it sums up in float32.

At the learning rates of RL (1e-6) an update is smaller than half a unit in the last place of a
bfloat16 weight, so updates are collected in a float32 master and the live weights are its rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from polymath_fast.config import Config

_NORM_CHUNK = 1 << 20  # elements whose squares are summed in float32 before float64 takes over


class FlatAdamW:
    """Owns the model's parameters: afterwards they are views of one flat buffer.

    Gradients of all backward passes since the last `step` or `zero_grad` add up in float32.
    """

    def __init__(self, model: nn.Module, config: Config):
        self.config = config
        self.updates = 0
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        # Decayed weights first, so that each of the two parameter groups is one range.
        named.sort(key=lambda item: item[1].dim() < 2)
        self.names = [name for name, _ in named]
        params = [p for _, p in named]
        decayed = sum(p.numel() for p in params if p.dim() >= 2)
        self.live = torch.cat([p.data.reshape(-1) for p in params])
        self.master = self.live.float()
        self.grad = torch.zeros_like(self.master)
        self._adopt(params)
        halves = [slice(0, decayed), slice(decayed, None)]
        self._masters = [self.master[half] for half in halves]
        for master, half in zip(self._masters, halves, strict=True):
            master.grad = self.grad[half]
        self._adamw = torch.optim.AdamW(
            [
                {"params": [self._masters[0]], "weight_decay": config.weight_decay},
                {"params": [self._masters[1]], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=True,
        )

    def _adopt(self, params: list[nn.Parameter]) -> None:
        offset = 0
        for param in params:
            span = slice(offset, offset + param.numel())
            param.data = self.live[span].view(param.shape)
            target = self.grad[span].view(param.shape)
            param.register_post_accumulate_grad_hook(_adder(target))
            offset = span.stop

    def zero_grad(self) -> None:
        """Forget the gradients gathered so far."""
        self.grad.zero_()

    def grad_norm(self) -> float:
        """Euclidean norm of the gathered gradient; NaN or Inf when it is not finite."""
        norms = torch._foreach_norm(list(self.grad.split(_NORM_CHUNK)))
        return float(torch.linalg.vector_norm(torch.stack(norms).double()))

    def step(self, learning_rate: float) -> tuple[float, bool]:
        """Clip, update, round into the live weights, clear the gradient.

        Returns:
            The gradient's norm before clipping, and whether the update was made: a gradient that
            is not finite is thrown away and no weight changes.
        """
        norm = self.grad_norm()
        finite = math.isfinite(norm)
        if finite:
            limit = self.config.max_grad_norm
            if norm > limit:
                self.grad.mul_(limit / norm)
            for group in self._adamw.param_groups:
                group["lr"] = learning_rate
            self._adamw.step()
            self.live.copy_(self.master)
            self.updates += 1
        self.zero_grad()
        return norm, finite

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: (parameters,) float32 master, first and second moment."""
        states = [self._adamw.state[master] for master in self._masters]
        moments = {
            name: torch.cat([s[name] if s else torch.zeros_like(m) for s, m in pairs])
            for name in ("exp_avg", "exp_avg_sq")
            for pairs in [list(zip(states, self._masters, strict=True))]
        }
        return {"master": self.master, **moments}

    def load(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Continue exactly where `tensors` were taken, `updates` updates into the run."""
        self.master.copy_(tensors["master"])
        self.live.copy_(self.master)
        self.updates = updates
        start = 0
        for master in self._masters:
            span = slice(start, start + master.numel())
            self._adamw.state[master] = {
                "step": torch.tensor(float(updates), device=master.device),
                "exp_avg": tensors["exp_avg"][span].to(master.device, copy=True),
                "exp_avg_sq": tensors["exp_avg_sq"][span].to(master.device, copy=True),
            }
            start = span.stop


def _adder(target: Tensor):
    def add(param: nn.Parameter) -> None:
        target.add_(param.grad)
        param.grad = None

    return add


def learning_rate_at(step: int, config: Config) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, then constant or a half cosine to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    span = max(1, config.max_steps - config.warmup_steps)
    return (
        config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - config.warmup_steps) / span))
    )
