"""One batch of scored rollouts becomes one or more optimizer updates."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from polymath_fast import out_of_memory
from polymath_fast.config import Config
from polymath_fast.kernels import PolicyLossSpec
from polymath_fast.kernels.cpu import workspace
from polymath_fast.kernels.scratch import Arena
from polymath_fast.learner import out_of_memory as learning
from polymath_fast.learner.flat_storage import FlatStorage
from polymath_fast.learner.loss import Divisors, loss_spec
from polymath_fast.learner.metrics import UpdateMetrics
from polymath_fast.learner.optimizer import FlatAdamW, learning_rate_at
from polymath_fast.learner.packing import TrainingRow, shared_token_ratio
from polymath_fast.learner.passes import Passes
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.rows import minibatches, with_influence
from polymath_fast.ranks import ALONE, Ranks


class Learner:
    """Policy, optimizer and, with beta > 0, the frozen reference model.

    `storage` is where the weights are to lie, for example in an engine's memory. With `lends` the
    gradient's memory is kept between updates, for a sampler that works there, see `lend`. Of rows
    that belong to several processes each learns from its own; gradients add up through `ranks`.
    `folder` is where an off-loaded state may lie, see `FlatAdamW`.
    """

    def __init__(
        self,
        policy: Policy,
        config: Config,
        reference: Policy | None = None,
        storage: FlatStorage | None = None,
        *,
        lends: bool = False,
        ranks: Ranks = ALONE,
        folder: Path | None = None,
    ):
        self.policy = policy
        self.config = config
        self.passes = Passes(policy, config)
        self.reference = Passes(reference, config) if reference else None
        self.ranks = ranks
        self.optimizer = FlatAdamW(policy.model, config, storage, ranks, folder)
        self._lends = lends
        self._trim()

    def update(self, rows: Sequence[TrainingRow], step: int) -> dict[str, float]:
        """Learn from the rows of one batch, everybody's; returns metrics, or
        {"update/skipped": 1.0}.

        Rows without influence on the gradient never enter the model; the divisors count them.

        Raises:
            OutOfMemory: naming the setting to change. The weights stay good.
        """
        config = self._config_for(rows)
        regularised = config.beta != 0 or config.entropy_coef != 0
        needed = with_influence(rows, regularised)
        if not needed:
            return {"update/skipped": 1.0}
        trained = [len(row.token_ids) for row in rows if row.trained]
        updates = min(config.updates_per_batch, len(trained))
        divisors = Divisors(
            tokens=max(1, sum(trained) // updates), completions=max(1, len(rows) // updates)
        )
        tokens, rule = self.passes.microbatch_tokens, self.passes.tree_rule
        with out_of_memory.named(
            lambda: learning.advice(config, needed, tokens, rule), self.optimizer.zero_grad
        ):
            found = self._learn(needed, loss_spec(config, divisors), step, updates)
        self._trim()
        duplicates, shared = shared_token_ratio(needed)
        return found | {
            "learning_rate": learning_rate_at(step, config),
            "packing/duplicate_token_ratio": duplicates,
            "packing/shared_token_ratio": shared,
            "update/entropy_only": float(config is not self.config),
        }

    def _learn(
        self, needed: list[TrainingRow], spec: PolicyLossSpec, step: int, updates: int
    ) -> dict[str, float]:
        config, metrics, rank = self.config, UpdateMetrics(self.config), self.ranks.rank
        if updates > 1:
            needed = self.passes.with_logprobs(needed, "old_logprobs", rank)
        if self.reference is not None:
            needed = self.reference.with_logprobs(needed, "ref_logprobs", rank)
        for part in minibatches(needed, updates, f"{config.seed}-{step}"):
            own = [row for row in part if row.rank == rank]
            self.passes.learn(own, spec, metrics, lambda: self.optimizer.updates)
            norm, updated = self.optimizer.step(learning_rate_at(step, config))
            metrics.add_update(norm, updated)
        return metrics.result(self.ranks)

    def lend(self) -> AbstractContextManager[Arena | None]:
        """Inside, which must be between updates, the sampler's scratch memory lies in that of the
        gradient: fresh pages would cost it and the next update a few per cent of their time."""
        return self.optimizer.lend_gradient() if self._lends else nullcontext()

    def _trim(self) -> None:
        """Between updates nobody else needs the gradient's memory, nor what a CPU's heap keeps of
        the loader's or of an update's."""
        if not self._lends:
            self.optimizer.release()
        if self.policy.device.type == "cpu":
            workspace.trim()

    def save(self, folder: Path) -> None:
        """Write the live weights as a Hugging Face folder."""
        self.policy.save(folder)

    def _config_for(self, rows: Sequence[TrainingRow]) -> Config:
        """With --on-saturation entropy, rows without any advantage are trained on their entropy."""
        config = self.config
        if config.on_saturation != "entropy" or any(row.advantage for row in rows if row.trained):
            return config
        bonus = config.saturation_entropy_coef
        return replace(
            config,
            on_saturation="skip",
            entropy_coef=bonus,
            saturation_entropy_coef=Config.saturation_entropy_coef,
        )
