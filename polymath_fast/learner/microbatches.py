"""Which completions go through the model together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from polymath_fast.learner.packing import TrainingRow
from polymath_fast.learner.prefix_tree import PrefixTree

TARGETS_PER_ROW = 4  # most targets of a micro-batch for each row of the model it may hold


def split_rows(
    rows: Sequence[TrainingRow], max_tokens: int, tree: PrefixTree | None = None
) -> Iterator[list[list[int]]]:
    """Indices of `rows` for each micro-batch: at most `max_tokens` rows of the model each.

    Yields lists of micro-batches. Several in one list are completions of one prompt that do not fit
    together: the prompt is to be computed once for all of them, and is held meanwhile. Else a
    micro-batch holds its prompts, each once. Completions with the same inputs count once, and are
    brought together, as prompts are; with `tree`, so are those that begin alike, and the rows that
    it shares count once. A completion that does not fit by itself gets a micro-batch of its own,
    and a prompt of more than half of `max_tokens` leaves that half to its completions: it is rows
    above the limit, but not a pass for each of them. Targets are bounded as well, to
    `TARGETS_PER_ROW` x `max_tokens`.
    """
    chunk, used = [], _Size()
    for _, members in groupby(_together(rows, tree), key=lambda index: rows[index].prompt_ids):
        members = list(members)
        prompt_len = len(rows[members[0]].prompt_ids)
        room = max(max_tokens - prompt_len, max_tokens // 2)
        parts = _parts(rows, members, room, TARGETS_PER_ROW * max_tokens, tree)
        size = sum((size for _, size in parts), _Size(rows=prompt_len))
        whole = used + size
        if chunk and (whole.rows > max_tokens or whole.targets > TARGETS_PER_ROW * max_tokens):
            yield [chunk]
            chunk, used = [], _Size()
        if len(parts) > 1:
            yield [part for part, _ in parts]
        else:
            chunk, used = chunk + members, used + size
    if chunk:
        yield [chunk]


@dataclass(frozen=True)
class _Size:
    """What a micro-batch is measured by."""

    rows: int = 0
    targets: int = 0

    def __add__(self, other: _Size) -> _Size:
        return _Size(self.rows + other.rows, self.targets + other.targets)


def _parts(
    rows: Sequence[TrainingRow],
    members: Sequence[int],
    max_rows: int,
    max_targets: int,
    tree: PrefixTree | None,
) -> list[tuple[list[int], _Size]]:
    """Completions of one prompt, cut so that the rows and targets of each part fit."""
    parts: list[tuple[list[int], _Size]] = [([], _Size())]
    previous = None
    for index in members:
        row = rows[index]
        part, used = parts[-1]
        new = 0 if row.inputs == previous else len(row.inputs)
        if tree is not None and part:
            new = tree.new_rows(row.prompt_ids, previous, row.inputs)
        size = used + _Size(new, len(row.token_ids))
        if part and (size.rows > max_rows or size.targets > max_targets):
            part, size = [], _Size(len(row.inputs), len(row.token_ids))
            parts.append((part, size))
        part.append(index)
        parts[-1] = part, size
        previous = row.inputs
    return parts


def _together(rows: Sequence[TrainingRow], tree: PrefixTree | None) -> list[int]:
    """Indices of `rows`, same prompts and within them same inputs side by side; else in order, or
    with a tree in that of the inputs."""
    first: dict = {}
    for index, row in enumerate(rows):
        first.setdefault(row.prompt_ids, index)
        first.setdefault((row.prompt_ids, row.inputs), index)
    if tree is not None:
        return sorted(range(len(rows)), key=lambda i: (first[rows[i].prompt_ids], rows[i].inputs))
    return sorted(
        range(len(rows)),
        key=lambda i: (first[rows[i].prompt_ids], first[rows[i].prompt_ids, rows[i].inputs], i),
    )
