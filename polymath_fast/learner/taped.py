"""A backward pass without a forward pass: completions that the sampler's tape has, see
`rollout.tape`.

The prompt is computed here, as for micro-batches, see `SharedPrompt`. Layer by layer, from the last
one down, what the sampler kept of the chosen rows is gathered and differentiated; nothing else is
held, so that many more rows fit into one pass than where activations have to be kept.

Legend: P prompt tokens, R rows of completions, N targets, S states that predict them, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, groupby

import torch
from torch import Tensor, nn

from polymath_fast.kernels import PolicyLossSpec
from polymath_fast.kernels.cpu.decode import gate_and_up
from polymath_fast.kernels.cpu.operands import bits
from polymath_fast.kernels.cpu.recorded_head import RecordedPredictions
from polymath_fast.kernels.cpu.threads import parallel, split
from polymath_fast.kernels.cpu.workspace import buffer
from polymath_fast.kernels.prefix_attention import tiles
from polymath_fast.kernels.prefix_attention.blocks import to_blocks
from polymath_fast.learner import layer_passes
from polymath_fast.learner.layer_passes import Mlp, Projections, Rotation
from polymath_fast.learner.microbatches import split_rows
from polymath_fast.learner.packing import PackedBatch, TrainingRow, pack
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.prefix_tree import PrefixTree
from polymath_fast.learner.shared_prompt import SharedPrompt


class TapedPass:
    """The pass of recorded completions of one prompt, packed `prompt_apart`."""

    def __init__(
        self,
        policy: Policy,
        rows: Sequence[TrainingRow],
        batch: PackedBatch,
        prompt: SharedPrompt,
    ):
        """`rows` are those of `batch`; all of them are recorded, by the weights of `policy`."""
        self._decoder = policy.model.get_decoder()
        self._rows, self._batch, self._prompt = rows, batch, prompt
        self._kept = rows[0].recorded.activations
        self._index = _taped_rows(rows, batch)
        rows_here = len(self._index)
        (self._block,) = to_blocks(batch.blocks, rows_here, batch.blocks[0].prompt_len + rows_here)
        self._states = batch.hidden_rows.unique(return_inverse=True)
        self._last = self._kept.hidden[-1].index_select(0, self._index).requires_grad_()

    def hidden(self, spec: PolicyLossSpec) -> Tensor:
        """(N, H) as `Policy.hidden` has them, or (S, H) those of `predictions`."""
        rows = self._states[0] if self._predicts(spec) else self._batch.hidden_rows
        return self._prompt.predicting(self._decoder.norm(self._last), rows)

    def predictions(self, spec: PolicyLossSpec) -> tuple[RecordedPredictions, Tensor] | tuple[()]:
        """Of the N targets, and which of the S states predicts each; nothing, unless the tape has
        what the loss needs of them."""
        if not self._predicts(spec):
            return ()
        kept = RecordedPredictions.joined([row.recorded.predictions for row in self._rows])
        return kept, self._states[1]

    def _predicts(self, spec: PolicyLossSpec) -> bool:
        kept = [row.recorded.predictions for row in self._rows]
        same = all(p is not None and p.temperature == spec.temperature for p in kept)
        return same and not spec.entropy_coef

    @torch.no_grad()
    def backward(self) -> None:
        """Add what follows from the gradient of `hidden` to the parameters' and the prompt's."""
        if not len(self._index):
            return
        ids, positions = self._batch.input_ids[0], self._batch.position_ids
        rotation = Rotation.of(self._decoder.rotary_emb(self._last, positions), 1)
        upstream = self._last.grad
        for number in reversed(range(len(self._decoder.layers))):
            upstream = self._layer(number, self._decoder.layers[number], rotation, upstream)
        with torch.enable_grad():
            embedded = self._decoder.embed_tokens(ids)
        if embedded.requires_grad:
            embedded.backward(upstream)

    def _layer(self, number: int, layer: nn.Module, rotation: Rotation, upstream: Tensor) -> Tensor:
        """The gradient (R, H) of a layer's input from that of its output."""
        before, behind = Projections.of(layer), Mlp.of(layer)
        x, stacked, attended, lse, between, gate_up = self._gathered(number)
        d_attended, d_x, d_parameters = layer_passes.mlp_gradient(
            behind, attended, between, gate_up, upstream
        )
        _accumulate(behind.parameters, d_parameters)
        normalised = before.head_norms[0] is not None
        rotated = torch.empty_like(stacked) if normalised else stacked
        layer_passes.rotate(stacked, before, rotation, rotated)
        queries, keys = before.counts(stacked.shape[2])
        q, k, v = rotated.split([queries, keys, keys], dim=1)
        d_heads = self._attention(
            number, q, k, v, attended.view(q.shape), lse, d_attended.view(q.shape)
        )
        d_x, d_parameters = layer_passes.projections_gradient(
            before, rotation, x, stacked if normalised else None, d_heads, d_x
        )
        _accumulate(before.parameters, d_parameters)
        return d_x

    def _attention(
        self, number: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the completions' q, k and v; those of the prompt's go to the prompt."""
        k, v = self._prompt.extend(number, k, v)
        scale = self._decoder.layers[number].self_attn.scaling
        d_q, d_k, d_v = tiles.gradient(q, k, v, out, lse, d_out, self._block, scale)
        end = self._prompt.length
        self._prompt.add(number, d_k[:end], d_v[:end])
        return d_q, d_k[end:], d_v[end:]

    def _gathered(self, number: int) -> list[Tensor]:
        """The rows of all that was kept of one layer; the next call overwrites them."""
        count, found = len(self._index), []
        for name, kept in zip(self._kept._fields[:-1], self._kept, strict=False):
            out = buffer(f"taped {name}", (count, *kept.shape[2:]), kept.dtype)
            found.append(torch.index_select(kept[number], 0, self._index, out=out))
        kept, inner = self._kept.gate_up[number], self._decoder.config.intermediate_size
        gate_up = buffer("taped gate_up", (count, 2 * inner), kept.dtype)
        parallel(gate_and_up, split(count), bits(kept), self._index.numpy(), bits(gate_up))
        return [*found, gate_up]


def taped_passes(
    policy: Policy, rows: Sequence[TrainingRow], max_tokens: int, tree: PrefixTree | None
) -> Iterator[tuple[PackedBatch, TapedPass]]:
    """Recorded `rows` in passes of about `max_tokens` rows; call `backward` of the loss and then of
    the pass before taking the next one. Each prompt is computed once."""
    ordered = sorted(rows, key=lambda row: row.prompt_ids)
    for prompt_ids, group in groupby(ordered, key=lambda row: row.prompt_ids):
        members, prompt = list(group), policy.share(prompt_ids)
        for part in chain.from_iterable(split_rows(members, max_tokens, tree)):
            chosen = [members[i] for i in part]
            batch = pack(chosen, policy.device, prompt_apart=True, tree=tree)
            yield batch, TapedPass(policy, chosen, batch, prompt)
        prompt.backward()


def _taped_rows(rows: Sequence[TrainingRow], batch: PackedBatch) -> Tensor:
    """(R,) int64: the row of the tape for each row of `batch`. Completions that share a row were
    given the same tokens there, so it does not matter whose is taken."""
    index = torch.empty(batch.input_ids.shape[1], dtype=torch.int64)
    bounds = batch.cu_seqlens.tolist()
    for row, start, stop in zip(rows, bounds, bounds[1:], strict=False):
        index[batch.hidden_rows[start + 1 : stop] - 1] = row.recorded.rows
    return index


def _accumulate(parameters: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    """What autograd does with the gradients that a node returns."""
    pairs = [
        (parameter, gradient)
        for parameter, gradient in zip(parameters, gradients, strict=True)
        if gradient is not None and parameter.requires_grad
    ]
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))
