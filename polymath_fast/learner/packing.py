"""Ragged completions of shared prompts as one row of tokens, without padding.

A packed row holds, for every distinct prompt, [prompt | completion_1 | ... | completion_B]. The
last token of a completion predicts nothing, so it is a target but never an input. Completions of
one prompt with the same inputs share the rows of the model: their targets read the same states.
With a `PrefixTree` completions that begin alike share the rows of their beginning, too.

Legend: T rows that enter the model, N completion tokens (targets), B completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from polymath_fast.kernels.transfer import send
from polymath_fast.learner.prefix_tree import PrefixTree, common_length, flat_segments

if TYPE_CHECKING:
    from polymath_fast.rollout.tape import Recorded


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """One completion with everything the loss wants to know about it."""

    prompt_ids: tuple[int, ...]
    token_ids: Sequence[int]
    """(length,) sampled ids; a completion without tokens carries no loss and is not a row"""
    sampling_logprobs: Sequence[float]
    """(length,) log-probs under the sampler"""
    advantage: float
    trained: bool = True
    """False: counts as a sequence of the batch, but none of its tokens carries loss"""
    old_logprobs: Sequence[float] | None = None
    """(length,) log-probs before the first update on this batch; None = on policy"""
    ref_logprobs: Sequence[float] | None = None
    """(length,) log-probs of the reference model"""
    multiplicity: int = 1
    """how many completions of the batch this row stands for, see `merge_duplicates`"""
    rank: int = 0
    """of the process that learns from it"""
    recorded: Recorded | None = field(default=None, compare=False, repr=False)
    """the sampler's forward pass over the inputs, if it was kept"""

    @property
    def inputs(self) -> tuple[int, ...]:
        """Completion tokens that enter the model."""
        return tuple(self.token_ids[:-1])


class PromptBlock(NamedTuple):
    """One prompt and its completions, as `prefix_attention_blocks` takes them."""

    prompt_len: int
    cu_seqlens: Tensor
    """(b + 1,) int32, row offsets of the block's segments counted from the prompt's end"""
    parents: tuple[int, ...] = ()
    """the segment that each one continues, -1 for the prompt; empty: all of them continue that"""


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """What one forward pass of the learner reads. Completions keep the order of the rows given."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64, restarting at the prompt's end
    blocks: tuple[PromptBlock, ...]  # in the order of their rows
    rows_saved: int  # rows that completions would need beside these without a prefix tree
    hidden_rows: Tensor  # (N,) int64: the row of T whose hidden state predicts targets[i]
    targets: Tensor  # (N,) int64
    cu_seqlens: Tensor  # (B + 1,) int32 over the N targets
    advantages: Tensor  # (B,) float32
    sampling_logprobs: Tensor  # (N,) float32
    multiplicity: Tensor | None = None  # (B,) float32; None: every completion counts once
    old_logprobs: Tensor | None = None  # (N,) float32
    ref_logprobs: Tensor | None = None  # (N,) float32


def merge_duplicates(rows: Sequence[TrainingRow]) -> list[TrainingRow]:
    """Rows that are equal in everything the loss reads become one row with their multiplicity."""
    merged: dict[tuple, list[TrainingRow]] = {}
    for row in rows:
        values = (row.token_ids, row.sampling_logprobs, row.old_logprobs, row.ref_logprobs)
        key = tuple(None if value is None else tuple(value) for value in values)
        merged.setdefault((row.prompt_ids, row.advantage, row.trained, *key), []).append(row)
    return [
        replace(same[0], multiplicity=sum(row.multiplicity for row in same))
        for same in merged.values()
    ]


def shared_token_ratio(rows: Sequence[TrainingRow]) -> tuple[float, float]:
    """Shares of the completions' inputs that need no row of their own: because the completion is
    there already, and because another one of its prompt begins alike (a prefix tree without a rule;
    includes the former)."""
    total = sum(len(row.inputs) * row.multiplicity for row in rows)
    if not total:
        return 0.0, 0.0
    distinct = sorted({(row.prompt_ids, row.inputs) for row in rows})
    kept = sum(len(inputs) for _, inputs in distinct)
    branches = kept - sum(
        common_length(one, other)
        for (prompt, one), (next_prompt, other) in pairwise(distinct)
        if prompt == next_prompt
    )
    return 1 - kept / total, 1 - branches / total


def pack(
    rows: Sequence[TrainingRow],
    device: torch.device | str = "cpu",
    *,
    prompt_apart: bool = False,
    tree: PrefixTree | None = None,
) -> PackedBatch:
    """Lay rows out as one packed batch; rows with the same prompt must stand next to each other.

    With `prompt_apart` the rows have one prompt, which is computed elsewhere: it is no part of
    `input_ids`, and `hidden_rows` counts from its last state, which is row 0. `tree` is a plan for
    these rows, maybe among others.
    """
    layout = _lay_out(rows, prompt_apart, tree)
    tensors = {
        "input_ids": torch.tensor([layout.tokens], dtype=torch.int64),
        "position_ids": torch.tensor([layout.positions], dtype=torch.int64),
        "hidden_rows": torch.tensor(layout.hidden_rows, dtype=torch.int64),
        **_of_loss(rows),
    }
    sent = dict(zip(tensors, send(list(tensors.values()), device), strict=True))
    return PackedBatch(blocks=tuple(layout.blocks), rows_saved=layout.rows_saved, **sent)


@dataclass
class _Layout:
    """What a `PackedBatch` says of the rows that enter the model."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    hidden_rows: list[int] = field(default_factory=list)
    blocks: list[PromptBlock] = field(default_factory=list)
    rows_saved: int = 0


def _lay_out(rows: Sequence[TrainingRow], prompt_apart: bool, tree: PrefixTree | None) -> _Layout:
    layout = _Layout()
    for prompt, group in groupby(rows, key=lambda row: row.prompt_ids):
        length, last = len(prompt), 0
        if not prompt_apart:
            last = len(layout.tokens) + length - 1
            layout.tokens += prompt
            layout.positions += range(length)
        inputs = [row.inputs for row in group]
        made = flat_segments(inputs) if tree is None else tree.segments(prompt, inputs)
        layout.tokens += made.tokens
        layout.positions += [length + depth for depth in made.depths]
        for each in inputs:
            layout.hidden_rows += [last, *(last + 1 + place for place in made.rows[each])]
        layout.rows_saved += sum(map(len, set(inputs))) - len(made.tokens)
        offsets = torch.tensor(made.offsets, dtype=torch.int32)
        layout.blocks.append(PromptBlock(length, offsets, made.parents))
    return layout


def _of_loss(rows: Sequence[TrainingRow]) -> dict[str, Tensor]:
    """What a `PackedBatch` says of the completions, whatever enters the model."""
    lengths = torch.tensor([len(row.token_ids) for row in rows], dtype=torch.int32)
    cu_seqlens = torch.zeros(len(rows) + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=cu_seqlens[1:])
    tensors = {
        "targets": torch.tensor(_of_tokens(rows, "token_ids"), dtype=torch.int64),
        "cu_seqlens": cu_seqlens,
        "advantages": torch.tensor([row.advantage for row in rows], dtype=torch.float32),
    }
    if any(row.multiplicity > 1 for row in rows):
        counts = [row.multiplicity for row in rows]
        tensors["multiplicity"] = torch.tensor(counts, dtype=torch.float32)
    for name in ("sampling_logprobs", "old_logprobs", "ref_logprobs"):
        if getattr(rows[0], name) is not None:
            tensors[name] = torch.tensor(_of_tokens(rows, name), dtype=torch.float32)
    return tensors


def _of_tokens(rows: Sequence[TrainingRow], name: str) -> list:
    return [value for row in rows for value in getattr(row, name)]


def token_counts(cu_seqlens: Tensor, multiplicity: Tensor | None, count: int) -> Tensor:
    """(count,) float32: how many completions of the batch each token stands for."""
    if multiplicity is None:
        return torch.ones(count, device=cu_seqlens.device, dtype=torch.float32)
    return multiplicity.repeat_interleave(cu_seqlens.diff(), output_size=count)


def pack_prompt(prompt_ids: Sequence[int], device: torch.device | str = "cpu") -> PackedBatch:
    """A prompt without completions."""
    row = TrainingRow(prompt_ids=prompt_ids, token_ids=(), sampling_logprobs=(), advantage=0.0)
    return pack([row], device)
