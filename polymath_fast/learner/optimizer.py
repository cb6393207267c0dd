"""AdamW over flat buffers: live weights in the model's dtype, everything it sums up in float32.

At the learning rates of RL (1e-6) an update is smaller than half a unit in the last place of a
bfloat16 weight, so updates are collected in a float32 master and the live weights are its rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymath_fast.config import Config
from polymath_fast.kernels import flat_adamw
from polymath_fast.kernels.flat_adamw.segments import Segments
from polymath_fast.kernels.scratch import Arena
from polymath_fast.learner.flat_storage import FlatStorage, decayed, trained
from polymath_fast.learner.gradients import FlatGradient
from polymath_fast.learner.optimizer_state import OptimizerState
from polymath_fast.learner.sharding import Replicated, Sharded
from polymath_fast.ranks import ALONE, Ranks


class FlatAdamW:
    """Owns the model's parameters: afterwards they are views of one flat buffer.

    Gradients of all backward passes since the last `step` or `zero_grad` add up in float32.

    Args:
        model: its parameters that require gradients are trained; matrices are decayed.
        config: hyperparameters, the form of the master weights, and where the state lies.
        storage: where the weights are to lie, for example in the memory an engine samples from;
            a buffer of its own when left out. The weights of `model` are copied there. What
            `tensors` returns does not depend on it, so a run may be resumed in another storage.
        ranks: the processes whose gradients add up; with `config.shard_optimizer` each of them
            keeps the state of a part of the weights.
        folder: for the file with `config.offload_optimizer` on a CPU, see `OptimizerState`.

    Raises:
        UserError: `config` asks for what these weights or this device cannot do.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        storage: FlatStorage | None = None,
        ranks: Ranks = ALONE,
        folder: Path | None = None,
    ):
        self.config = config
        params = trained(model)
        self.storage = storage or FlatStorage.of(model)
        self.storage.adopt(model)
        self.live = self.storage.live
        spans = self.storage.spans()
        self._gradient = FlatGradient(self.live.numel(), self.live.device)
        self._gradient.gather((param, spans[name]) for name, param in params.items())
        self._exchange = (Sharded if config.shard_optimizer else Replicated)(
            ranks, self.live.numel()
        )
        self.state = OptimizerState(
            self.live,
            [spans[name] for name in params],
            self._exchange.part,
            config.master_weights,
            config.offload_optimizer,
            folder,
        )
        segments = Segments.of(
            ((*spans[name], decayed(param)) for name, param in params.items()), self.live.device
        )
        self._segments = functools.cache(segments.part)
        self._updates = torch.zeros((), dtype=torch.int64, device=self.live.device)

    @property
    def grad(self) -> Tensor:
        """(elements,) float32 gradient gathered so far."""
        return self._gradient.whole()

    @property
    def updates(self) -> int:
        """Updates made so far; waits for the device."""
        return int(self._updates)

    def zero_grad(self) -> None:
        """Forget the gradients gathered so far."""
        self._gradient.zero()

    def lend_gradient(self) -> AbstractContextManager[Arena]:
        """Forget the gradients; inside, operators take their scratch memory from theirs."""
        return self._gradient.lend()

    def release(self) -> None:
        """Forget the gradients; on a CPU their memory is the system's until there are new ones."""
        self._gradient.release()

    @torch.no_grad()
    def step(self, learning_rate: float) -> tuple[Tensor, Tensor]:
        """Add up everybody's gradients, clip, update, round into the live weights, forget the
        gradient, without waiting for the device; all processes have to call it.

        Returns:
            0-d tensors on the device: the sum's norm before clipping, and whether the update was
            made. A gradient that is not finite is thrown away and no weight changes.

        Raises:
            EngineError: another process is gone or failed.
        """
        config, grad = self.config, self.grad
        norm = self._exchange.add_up(grad)

        def update(start: int, stop: int, state: dict[str, Tensor]) -> None:
            flat_adamw(
                self.live[start:stop],
                grad=grad[start:stop],
                norm=norm,
                step=self._updates,
                learning_rate=learning_rate,
                segments=self._segments(start, stop),
                beta1=config.adam_beta1,
                beta2=config.adam_beta2,
                eps=config.adam_eps,
                weight_decay=config.weight_decay,
                max_grad_norm=config.max_grad_norm,
                zero_grad=False,
                **state,
            )

        self.state.sweep(update)
        finite = norm.isfinite()
        self._updates += finite
        self.zero_grad()
        self._exchange.publish(self.live)
        return norm, finite

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: (parameters,) float32 master, first and second moment.

        Parameters come in the order of `trained`, without gaps, whatever the storage and the form
        of the master weights. Where the processes share the state out, `state` has a part of it.
        """
        return self.state.gather()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Any], updates: int) -> None:
        """Continue exactly where `tensors` were taken, `updates` updates into the run; each may be
        anything of which slices are tensors. All processes have to call it."""
        self.state.scatter(tensors)
        self._exchange.publish(self.live)
        self._updates.fill_(updates)


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
