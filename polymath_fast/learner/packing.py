"""Ragged completions of shared prompts as one row of tokens, without padding.

A packed row holds, for every distinct prompt, [prompt | completion_1 | ... | completion_B]. The
last token of a completion predicts nothing, so it is a target but never an input.

Legend: T rows that enter the model, N completion tokens (targets), B completions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class PromptBlock:
    """Where one prompt and its completions lie in the packed row."""

    start: int
    prompt_len: int
    cu_seqlens: Tensor
    """(b + 1,) int32, row offsets of the block's completions counted from the prompt's end"""

    @property
    def end(self) -> int:
        """First row after the block."""
        return self.start + self.prompt_len + int(self.cu_seqlens[-1])


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """What one forward pass of the learner reads. Completions keep the order of the rows given."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64, restarting at the prompt's end
    blocks: tuple[PromptBlock, ...]
    hidden_rows: Tensor  # (N,) int64: the row of T whose hidden state predicts targets[i]
    targets: Tensor  # (N,) int64
    cu_seqlens: Tensor  # (B + 1,) int32 over the N targets
    advantages: Tensor  # (B,) float32
    sampling_logprobs: Tensor  # (N,) float32
    old_logprobs: Tensor | None  # (N,) float32
    ref_logprobs: Tensor | None  # (N,) float32


def split_rows(rows: Sequence[TrainingRow], max_tokens: int) -> Iterator[list[int]]:
    """Indices of `rows` for each micro-batch: at most `max_tokens` rows of the model each.

    A prompt counts once for all its completions in a micro-batch. Order is kept. A completion that
    is longer than `max_tokens` by itself gets a micro-batch of its own.
    """
    chunk: list[int] = []
    used, prompts = 0, set()
    for index, row in enumerate(rows):
        cost = len(row.token_ids) - 1 + (0 if row.prompt_ids in prompts else len(row.prompt_ids))
        if chunk and used + cost > max_tokens:
            yield chunk
            chunk, used, prompts = [], 0, set()
            cost = len(row.token_ids) - 1 + len(row.prompt_ids)
        chunk.append(index)
        used += cost
        prompts.add(row.prompt_ids)
    if chunk:
        yield chunk


def pack(rows: Sequence[TrainingRow], device: torch.device | str = "cpu") -> PackedBatch:
    """Lay rows out as one packed batch; rows with the same prompt must stand next to each other."""
    input_ids: list[int] = []
    positions: list[int] = []
    hidden_rows: list[int] = []
    blocks: list[PromptBlock] = []
    for prompt, members in _runs(rows):
        start, length = len(input_ids), len(prompt)
        input_ids += prompt
        positions += range(length)
        offsets = [0]
        for row in members:
            first = len(input_ids)
            inputs = row.token_ids[:-1]
            hidden_rows += [start + length - 1, *range(first, first + len(inputs))]
            input_ids += inputs
            positions += range(length, length + len(inputs))
            offsets.append(offsets[-1] + len(inputs))
        blocks.append(PromptBlock(start, length, torch.tensor(offsets, dtype=torch.int32)))
    lengths = torch.tensor([len(row.token_ids) for row in rows], dtype=torch.int32)
    cu_seqlens = torch.zeros(len(rows) + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=cu_seqlens[1:])

    def flat(values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    def optional(name: str) -> Tensor | None:
        if getattr(rows[0], name) is None:
            return None
        return flat([x for row in rows for x in getattr(row, name)], torch.float32)

    return PackedBatch(
        input_ids=flat(input_ids, torch.int64).unsqueeze(0),
        position_ids=flat(positions, torch.int64).unsqueeze(0),
        blocks=tuple(blocks),
        hidden_rows=flat(hidden_rows, torch.int64),
        targets=flat([token for row in rows for token in row.token_ids], torch.int64),
        cu_seqlens=cu_seqlens.to(device),
        advantages=flat([row.advantage for row in rows], torch.float32),
        sampling_logprobs=flat([x for row in rows for x in row.sampling_logprobs], torch.float32),
        old_logprobs=optional("old_logprobs"),
        ref_logprobs=optional("ref_logprobs"),
    )


def _runs(rows: Sequence[TrainingRow]) -> Iterator[tuple[tuple[int, ...], list[TrainingRow]]]:
    members: list[TrainingRow] = []
    for row in rows:
        if members and row.prompt_ids != members[0].prompt_ids:
            yield members[0].prompt_ids, members
            members = []
        members.append(row)
    if members:
        yield members[0].prompt_ids, members
