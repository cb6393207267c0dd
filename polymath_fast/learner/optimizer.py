"""AdamW over flat buffers: live weights in the model's dtype, everything it sums up in float32.

At the learning rates of RL (1e-6) an update is smaller than half a unit in the last place of a
bfloat16 weight, so updates are collected in a float32 master and the live weights are its rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from polymath_fast.config import Config
from polymath_fast.learner.flat_storage import FlatStorage, decayed, merged, trained

_NORM_CHUNK = 1 << 20  # elements whose squares are summed in float32 before float64 takes over
_STATE = ("master", "exp_avg", "exp_avg_sq")


class FlatAdamW:
    """Owns the model's parameters: afterwards they are views of one flat buffer.

    Gradients of all backward passes since the last `step` or `zero_grad` add up in float32.

    Args:
        model: its parameters that require gradients are trained; matrices are decayed.
        config: hyperparameters.
        storage: where the weights are to lie, for example in the memory an engine samples from;
            a buffer of its own when left out. The weights of `model` are copied there. What
            `tensors` returns does not depend on it, so a run may be resumed in another storage.
    """

    def __init__(self, model: nn.Module, config: Config, storage: FlatStorage | None = None):
        self.config = config
        self.updates = 0
        params = trained(model)
        self.storage = storage or FlatStorage.of(model)
        self.storage.adopt(model)
        self.live = self.storage.live
        self.master = self.live.float()
        self.grad = torch.zeros_like(self.master)
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        spans = self.storage.spans()
        self._spans = [spans[name] for name in params]
        for param, (start, stop) in zip(params.values(), self._spans, strict=True):
            target = self.grad[start:stop].view(param.shape)
            param.register_post_accumulate_grad_hook(_adder(target))
        segments = merged((*spans[name], decayed(p)) for name, p in params.items())
        self._adamw = self._torch_adamw(list(segments))

    def _torch_adamw(self, segments: list[tuple[int, int, bool]]) -> torch.optim.AdamW:
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        self._masters = {}
        for start, stop, decay in segments:
            master = self.master[start:stop]
            master.grad = self.grad[start:stop]
            groups[decay].append(master)
            self._masters[start, stop] = master
        config = self.config
        adamw = torch.optim.AdamW(
            [
                {"params": groups[True], "weight_decay": config.weight_decay},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=True,
        )
        for (start, stop), master in self._masters.items():
            adamw.state[master] = {
                "step": torch.zeros((), device=master.device),
                "exp_avg": self.exp_avg[start:stop],
                "exp_avg_sq": self.exp_avg_sq[start:stop],
            }
        return adamw

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
            for start, stop in self._masters:
                self.live[start:stop].copy_(self.master[start:stop])
            self.updates += 1
        self.zero_grad()
        return norm, finite

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: (parameters,) float32 master, first and second moment.

        Parameters come in the order of `trained`, without gaps, whatever the storage.
        """
        return {name: self._gathered(getattr(self, name)) for name in _STATE}

    def load(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Continue exactly where `tensors` were taken, `updates` updates into the run."""
        self.updates = updates
        for name in _STATE:
            self._scatter(tensors[name], getattr(self, name))
        for (start, stop), master in self._masters.items():
            self._adamw.state[master]["step"].fill_(updates)
            self.live[start:stop].copy_(master)

    def _gathered(self, flat: Tensor) -> Tensor:
        ends = [0, *(stop for _, stop in self._spans)]
        if ends == [*(start for start, _ in self._spans), flat.numel()]:
            return flat
        return torch.cat([flat[start:stop].cpu() for start, stop in self._spans])

    def _scatter(self, source: Tensor, flat: Tensor) -> None:
        offset = 0
        for start, stop in self._spans:
            flat[start:stop].copy_(source[offset : offset + stop - start])
            offset += stop - start


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
