"""Passes of rows through the model, in micro-batches: to their gradients, or to their log-probs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polymath_fast import memory
from polymath_fast.config import Config
from polymath_fast.kernels import PolicyLossOutput, PolicyLossSpec, linear_logprobs
from polymath_fast.learner.loss import packed_loss
from polymath_fast.learner.metrics import UpdateMetrics
from polymath_fast.learner.microbatches import split_rows
from polymath_fast.learner.packing import PackedBatch, TrainingRow, merge_duplicates, pack
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.prefix_tree import PrefixTree, plan
from polymath_fast.learner.tree_rule import rule_for

if TYPE_CHECKING:
    from polymath_fast.kernels.cpu.recorded_head import RecordedPredictions


class Passes:
    """Those of one model, the policy's or its reference's."""

    def __init__(self, policy: Policy, config: Config):
        self.policy = policy
        self.config = config
        self.tree_rule = rule_for(
            config.prefix_tree, policy.device, policy.head.weight.dtype, policy.head_dim
        )

    @property
    def microbatch_tokens(self) -> int:
        """Tokens that go through the model at once."""
        return memory.microbatch_tokens(self.config, self.policy.device.type)

    def learn(
        self,
        rows: Sequence[TrainingRow],
        spec: PolicyLossSpec,
        metrics: UpdateMetrics,
        weight_version: Callable[[], int],
    ) -> None:
        """Add the gradient of the rows' loss to the parameters', and what there is to tell.

        `weight_version` of the weights as they are is asked for only where rows were recorded.
        """
        taped, others = self._by_tape(merge_duplicates(rows), weight_version)
        for _, batch, hidden in self._microbatches(others):
            metrics.add_microbatch(self._backward(hidden, batch, spec), batch)
        if not taped:
            return
        from polymath_fast.learner.taped import taped_passes

        limit = memory.TAPED_ROWS * self.microbatch_tokens
        for batch, recorded in taped_passes(self.policy, taped, limit, self._tree(taped)):
            out = self._backward(recorded.hidden(spec), batch, spec, *recorded.predictions(spec))
            recorded.backward()
            metrics.add_microbatch(out, batch, taped=True)

    @torch.no_grad()
    def with_logprobs(
        self, rows: Sequence[TrainingRow], field: str, rank: int = 0
    ) -> list[TrainingRow]:
        """The rows, with the log-probs of their tokens in `field` of those that are `rank`'s."""
        filled = list(rows)
        places = [index for index, row in enumerate(rows) if row.rank == rank]
        own = [rows[index] for index in places]
        # read after the last pass, so that a GPU has one to do while the next is packed
        found = [
            (chunk, self._logprobs(batch, hidden))
            for chunk, batch, hidden in self._microbatches(own)
        ]
        for chunk, logprobs in found:
            lengths = [len(own[index].token_ids) for index in chunk]
            for index, values in zip(chunk, logprobs.cpu().split(lengths), strict=True):
                filled[places[index]] = replace(own[index], **{field: values.tolist()})
        return filled

    def _by_tape(
        self, rows: Sequence[TrainingRow], weight_version: Callable[[], int]
    ) -> tuple[list[TrainingRow], list[TrainingRow]]:
        """Rows whose forward pass was recorded under the weights as they are, and the others.

        A pass over the tape is of one prompt. Where several have few rows each, they are among the
        others, who learn side by side.
        """
        sizes: Counter[tuple[int, ...]] = Counter()
        for row in rows:
            sizes[row.prompt_ids] += len(row.inputs) if row.recorded else 0
        least = 0 if len(sizes) == 1 else self.microbatch_tokens // 4
        now = weight_version() if any(sizes.values()) else None  # waits for the device

        def taped(row: TrainingRow) -> bool:
            known = row.recorded is not None and row.recorded.weight_version == now
            return known and sizes[row.prompt_ids] >= least

        return [row for row in rows if taped(row)], [row for row in rows if not taped(row)]

    def _microbatches(
        self, rows: Sequence[TrainingRow]
    ) -> Iterator[tuple[list[int], PackedBatch, Tensor]]:
        """Indices of rows, the rows as a batch, and its (N, H) hidden states.

        A prompt whose completions need several micro-batches is computed once for all of them, and
        its gradient follows their last: call backward for each batch before taking the next one.
        """
        tree = self._tree(rows)
        for parts in split_rows(rows, self.microbatch_tokens, tree):
            apart = len(parts) > 1
            prompt = self.policy.share(rows[parts[0][0]].prompt_ids) if apart else None
            for part in parts:
                chosen = [rows[i] for i in part]
                batch = pack(chosen, self.policy.device, prompt_apart=apart, tree=tree)
                yield part, batch, self.policy.hidden(batch, prompt)
            if prompt is not None:
                prompt.backward()

    def _tree(self, rows: Sequence[TrainingRow]) -> PrefixTree | None:
        """The common beginnings of `rows` that are computed once."""
        return None if self.tree_rule is None else plan(rows, self.tree_rule)

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

    def _logprobs(self, batch: PackedBatch, hidden: Tensor) -> Tensor:
        head = self.policy.head
        return linear_logprobs(
            hidden,
            head.weight,
            batch.targets,
            bias=head.bias,
            temperature=self.config.temperature,
        )[0]
