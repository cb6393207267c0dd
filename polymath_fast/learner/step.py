"""One batch of scored rollouts becomes one or more optimizer updates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polymath_fast import memory
from polymath_fast.config import Config
from polymath_fast.kernels import (
    PolicyLossOutput,
    PolicyLossSpec,
    linear_logprobs,
)
from polymath_fast.kernels.cpu import workspace
from polymath_fast.kernels.scratch import Arena
from polymath_fast.learner import out_of_memory
from polymath_fast.learner.flat_storage import FlatStorage
from polymath_fast.learner.loss import Divisors, loss_spec, packed_loss
from polymath_fast.learner.metrics import UpdateMetrics
from polymath_fast.learner.microbatches import split_rows
from polymath_fast.learner.optimizer import FlatAdamW, learning_rate_at
from polymath_fast.learner.packing import (
    PackedBatch,
    TrainingRow,
    merge_duplicates,
    pack,
    shared_token_ratio,
)
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.prefix_tree import PrefixTree, plan
from polymath_fast.learner.rows import minibatches
from polymath_fast.learner.tree_rule import rule_for
from polymath_fast.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from polymath_fast.kernels.cpu.recorded_head import RecordedPredictions


class Learner:
    """Policy, optimizer and, with beta > 0, the frozen reference model.

    `storage` is where the weights are to lie, for example in an engine's memory. With `lends` the
    gradient's memory is kept between updates, for a sampler that works there, see `lend`. Of rows
    that belong to several processes each learns from its own; gradients add up through `ranks`.
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
    ):
        self.policy = policy
        self.config = config
        self.reference = reference
        self.ranks = ranks
        self.optimizer = FlatAdamW(policy.model, config, storage, ranks)
        self._lends = lends
        self._trim()
        self.tree_rule = rule_for(
            config.prefix_tree, policy.device, policy.head.weight.dtype, policy.head_dim
        )

    def update(self, rows: Sequence[TrainingRow], step: int) -> dict[str, float]:
        """Learn from the rows of one batch, everybody's; returns metrics, or
        {"update/skipped": 1.0}.

        Rows without influence on the gradient never enter the model; the divisors count them.

        Raises:
            OutOfMemory: naming the setting to change. The weights stay good.
        """
        config = self._config_for(rows)
        regularised = config.beta != 0 or config.entropy_coef != 0
        needed = [row for row in rows if row.trained and (row.advantage != 0 or regularised)]
        if not needed:
            return {"update/skipped": 1.0}
        trained = sum(len(row.token_ids) for row in rows if row.trained)
        share = config.updates_per_batch
        divisors = Divisors(tokens=max(1, trained // share), completions=max(1, len(rows) // share))
        with out_of_memory.named(
            config, needed, self.microbatch_tokens, self.optimizer.zero_grad, self.tree_rule
        ):
            found = self._learn(needed, loss_spec(config, divisors), step)
        self._trim()
        duplicates, shared = shared_token_ratio(needed)
        return found | {
            "learning_rate": learning_rate_at(step, config),
            "packing/duplicate_token_ratio": duplicates,
            "packing/shared_token_ratio": shared,
            "update/entropy_only": float(config is not self.config),
        }

    def _learn(
        self, needed: list[TrainingRow], spec: PolicyLossSpec, step: int
    ) -> dict[str, float]:
        config, metrics = self.config, UpdateMetrics(self.config)
        if config.updates_per_batch > 1:
            needed = self._with_logprobs(needed, self.policy, "old_logprobs")
        if self.reference is not None:
            needed = self._with_logprobs(needed, self.reference, "ref_logprobs")
        for part in minibatches(needed, config.updates_per_batch, f"{config.seed}-{step}"):
            self._accumulate(self._own(part), spec, metrics)
            norm, updated = self.optimizer.step(learning_rate_at(step, config))
            metrics.add_update(norm, updated)
        return metrics.result(self.ranks)

    def _own(self, rows: Sequence[TrainingRow]) -> list[TrainingRow]:
        """Those that this process learns from."""
        return [row for row in rows if row.rank == self.ranks.rank]

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

    @property
    def microbatch_tokens(self) -> int:
        """Tokens that go through the model at once."""
        return memory.microbatch_tokens(self.config, self.policy.device.type)

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

    def _accumulate(
        self, rows: Sequence[TrainingRow], spec: PolicyLossSpec, metrics: UpdateMetrics
    ) -> None:
        taped, others = self._by_tape(merge_duplicates(rows))
        for _, batch, hidden in self._microbatches(self.policy, others):
            metrics.add_microbatch(self._backward(hidden, batch, spec), batch)
        if not taped:
            return
        from polymath_fast.learner.taped import taped_passes

        limit = memory.TAPED_ROWS * self.microbatch_tokens
        for batch, recorded in taped_passes(self.policy, taped, limit, self._tree(taped)):
            out = self._backward(recorded.hidden(spec), batch, spec, *recorded.predictions(spec))
            recorded.backward()
            metrics.add_microbatch(out, batch, taped=True)

    def _by_tape(self, rows: Sequence[TrainingRow]) -> tuple[list[TrainingRow], list[TrainingRow]]:
        """Rows whose forward pass was recorded under the weights as they are, and the others.

        A pass over the tape is of one prompt. Where several have few rows each, they are among the
        others, who learn side by side.
        """
        sizes: Counter[tuple[int, ...]] = Counter()
        for row in rows:
            sizes[row.prompt_ids] += len(row.inputs) if row.recorded else 0
        least = 0 if len(sizes) == 1 else self.microbatch_tokens // 4
        now = self.optimizer.updates if any(sizes.values()) else None  # waits for the device

        def taped(row: TrainingRow) -> bool:
            known = row.recorded is not None and row.recorded.weight_version == now
            return known and sizes[row.prompt_ids] >= least

        return [row for row in rows if taped(row)], [row for row in rows if not taped(row)]

    def _backward(
        self,
        hidden: Tensor,
        batch: PackedBatch,
        spec: PolicyLossSpec,
        predictions: RecordedPredictions | None = None,
        states: Tensor | None = None,
    ) -> PolicyLossOutput:
        """Loss of a micro-batch with hidden states (N, H), or (S, H) of `predictions`, and its
        gradients."""
        tolerance = "auto" if self.config.active_vocabulary == "auto" else 0.0
        out = packed_loss(self.policy.head, hidden, batch, spec, tolerance, predictions, states)
        out.loss.backward()
        return out

    def _microbatches(
        self, policy: Policy, rows: Sequence[TrainingRow]
    ) -> Iterator[tuple[list[int], PackedBatch, Tensor]]:
        """Indices of rows, the rows as a batch, and its (N, H) hidden states under `policy`.

        A prompt whose completions need several micro-batches is computed once for all of them, and
        its gradient follows their last: call backward for each batch before taking the next one.
        """
        tree = self._tree(rows)
        for parts in split_rows(rows, self.microbatch_tokens, tree):
            apart = len(parts) > 1
            prompt = policy.share(rows[parts[0][0]].prompt_ids) if apart else None
            for part in parts:
                chosen = [rows[i] for i in part]
                batch = pack(chosen, policy.device, prompt_apart=apart, tree=tree)
                yield part, batch, policy.hidden(batch, prompt)
            if prompt is not None:
                prompt.backward()

    def _tree(self, rows: Sequence[TrainingRow]) -> PrefixTree | None:
        """The common beginnings of `rows` that are computed once."""
        return None if self.tree_rule is None else plan(rows, self.tree_rule)

    @torch.no_grad()
    def _with_logprobs(
        self, rows: Sequence[TrainingRow], policy: Policy, field: str
    ) -> list[TrainingRow]:
        """The rows, with `policy`'s log-probs of the tokens in `field` of this process's own."""
        filled = list(rows)
        places = [index for index, row in enumerate(rows) if row.rank == self.ranks.rank]
        own = [rows[index] for index in places]
        # read after the last pass, so that a GPU has one to do while the next is packed
        found = [
            (chunk, self._logprobs(policy, batch, hidden))
            for chunk, batch, hidden in self._microbatches(policy, own)
        ]
        for chunk, logprobs in found:
            lengths = [len(own[index].token_ids) for index in chunk]
            for index, values in zip(chunk, logprobs.cpu().split(lengths), strict=True):
                filled[places[index]] = replace(own[index], **{field: values.tolist()})
        return filled

    def _logprobs(self, policy: Policy, batch: PackedBatch, hidden: Tensor) -> Tensor:
        return linear_logprobs(
            hidden,
            policy.head.weight,
            batch.targets,
            bias=policy.head.bias,
            temperature=self.config.temperature,
        )[0]
