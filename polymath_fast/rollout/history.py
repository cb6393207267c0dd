"""What followed what in earlier completions of a prompt: tables of n-grams that drafts come from.

A draft only decides how fast tokens are drawn, never which, so keys may collide and counts may be
old. W is the longest context that is looked up.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

ORDERS = (16, 8, 4, 2)
"""tokens of context that are looked up, longest first"""
WIDTH = ORDERS[0]
_NOTHING = -1  # stands before the first token of a prompt
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no token's bits are lost
_LEAST = 0.2  # chance of being right below which a draft ends
_STEPS = 4
_MAX_TOKENS = 1 << 20
_PREFIX = "speculation/"


class NGramTable:
    """The most frequent token after every context in a set of completions of one prompt."""

    def __init__(
        self, prompt_ids: Sequence[int], completions: Sequence[Sequence[int] | np.ndarray]
    ):
        """Contexts of first tokens reach into the prompt; none reaches into another completion."""
        pieces = [np.asarray(tokens, np.int64) for tokens in completions]
        head = np.array(context_of(prompt_ids), np.int64)
        flat = np.concatenate([part for piece in pieces for part in (head, piece)] or [head])
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        number = np.repeat(np.arange(len(pieces)), lengths)
        last = np.arange(len(number)) + WIDTH * (number + 1) - 1  # where each token's context ends
        following = flat[last + 1]
        order = np.argsort(following, kind="stable")
        last, following = last[order], following[order]
        keys = _keys(flat[last - back] for back in range(WIDTH))
        self._levels = [_most_frequent(keys[length], following) for length in ORDERS]

    def find(self, level: int, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token after each context of ORDERS[level] tokens, and the share of times it was that one;
        -1 and 0 where the context is unknown."""
        known, tokens, shares = self._levels[level]
        if not len(known):
            return np.full(len(keys), _NOTHING), np.zeros(len(keys))
        place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        found = known[place] == keys
        return np.where(found, tokens[place], _NOTHING), np.where(found, shares[place], 0.0)


def context_of(tokens: Sequence[int]) -> list[int]:
    """The last W of `tokens`; where there are fewer, nothing stands before them."""
    return [*[_NOTHING] * (WIDTH - len(tokens)), *tokens[max(0, len(tokens) - WIDTH) :]]


def draft(
    tables: Sequence[NGramTable], contexts: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may follow each context, as the tables have it.

    Of each context its longest known end counts; of two tables that know it, the one that is surer.
    A draft ends where all of it is right with a chance below `_LEAST`.

    Args:
        contexts: (B, W) token ids.
        most: tokens per draft at most.

    Returns:
        tokens (B, most) int64, and chances (B, most) that a draft is right up to there, falling
        from left to right and 0 past its end.
    """
    tokens = np.full((len(contexts), most), _NOTHING)
    chances = np.zeros((len(contexts), most))
    chance = np.ones(len(contexts))
    for depth in range(most):
        following, shares = _follow(tables, contexts)
        chance = chance * shares
        chance[chance < _LEAST] = 0
        if not chance.any():
            break
        tokens[:, depth], chances[:, depth] = following, chance
        contexts = np.concatenate([contexts[:, 1:], following[:, None]], axis=1)
    return tokens, chances


def _follow(tables: Sequence[NGramTable], contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keys = _keys(contexts[:, WIDTH - 1 - back] for back in range(WIDTH))
    tokens, shares = np.full(len(contexts), _NOTHING), np.zeros(len(contexts))
    for level, order in enumerate(ORDERS):
        unknown = shares == 0
        for table in tables:
            found, share = table.find(level, keys[order])
            surer = unknown & (share > shares)
            tokens, shares = np.where(surer, found, tokens), np.where(surer, share, shares)
    return tokens, shares


def _keys(columns: Iterable[np.ndarray]) -> dict[int, np.ndarray]:
    """Keys of the contexts of every order, from their tokens, the last one first."""
    keys, key = {}, np.uint64(0)
    for count, tokens in enumerate(columns, 1):
        key = key * _FACTOR + (tokens - _NOTHING).astype(np.uint64) + np.uint64(1)
        if count in ORDERS:
            keys[count] = key
    return keys


def _most_frequent(
    keys: np.ndarray, following: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct keys, sorted, with the most frequent token after each (the smallest of equals) and
    its share, as if one more token had been seen, another one: nothing is ever sure.

    `following` is sorted.
    """
    if not len(keys):
        return keys, following.astype(np.int32), np.empty(0, np.float32)
    order = np.argsort(keys, kind="stable")
    keys, following = keys[order], following[order]
    new_key = np.r_[True, keys[1:] != keys[:-1]]
    pairs = np.flatnonzero(new_key | np.r_[True, following[1:] != following[:-1]])
    counts = np.diff(np.r_[pairs, len(keys)])
    first = np.flatnonzero(new_key[pairs])
    rank = len(pairs) - 1 - np.arange(len(pairs))
    best = len(pairs) - 1 - np.maximum.reduceat(counts * len(pairs) + rank, first) % len(pairs)
    shares = counts[best] / (np.add.reduceat(counts, first) + 1)
    tokens = following[pairs[best]].astype(np.int32)
    return keys[pairs[first]], tokens, shares.astype(np.float32)


class History:
    """Completions of the last steps in which each prompt was asked, within a bound on tokens."""

    def __init__(self, steps: int | None = _STEPS, max_tokens: int = _MAX_TOKENS):
        """`steps` of each prompt are kept (None: all). When there are more than `max_tokens`, which
        take 4 bytes each and up to 64 more in a table, the prompt asked longest ago goes first."""
        self._steps, self._max_tokens = steps, max_tokens
        self._kept: OrderedDict[tuple[int, ...], deque[list[np.ndarray]]] = OrderedDict()
        self._tables: dict[tuple[int, ...], NGramTable] = {}

    @property
    def num_tokens(self) -> int:
        """Completion tokens that are kept."""
        return sum(map(len, self._all()))

    def add(self, prompt_ids: Sequence[int], completions: Iterable[Sequence[int]]) -> None:
        """Keep one step's completions of a prompt; of more than fit, the first ones."""
        prompt, step, room = tuple(prompt_ids), [], self._max_tokens
        for tokens in completions:
            room -= len(tokens)
            if room < 0:
                break
            step.append(np.array(tokens, np.int32))
        self._kept.setdefault(prompt, deque(maxlen=self._steps)).append(step)
        self._kept.move_to_end(prompt)
        self._tables.pop(prompt, None)
        while self.num_tokens > self._max_tokens:
            oldest, steps = next(iter(self._kept.items()))
            steps.popleft()
            self._tables.pop(oldest, None)
            if not steps:
                del self._kept[oldest]

    def table(self, prompt_ids: Sequence[int]) -> NGramTable | None:
        """The table of a prompt, None when nothing is known of it."""
        prompt = tuple(prompt_ids)
        if prompt not in self._kept:
            return None
        if prompt not in self._tables:
            completions = [tokens for step in self._kept[prompt] for tokens in step]
            self._tables[prompt] = NGramTable(prompt, completions)
        return self._tables[prompt]

    def tensors(self) -> dict[str, Tensor]:
        """All that `load` needs, for a checkpoint."""
        steps = [(prompt, step) for prompt, steps in self._kept.items() for step in steps]
        lists = {
            "prompts": [np.array(prompt, np.int32) for prompt in self._kept],
            "completions": [tokens for _, step in steps for tokens in step],
        }
        numbers = {prompt: number for number, prompt in enumerate(self._kept)}
        layout = [[numbers[prompt], len(step)] for prompt, step in steps]
        found = {"steps": torch.tensor(layout, dtype=torch.int32).reshape(-1, 2)}
        for name, arrays in lists.items():
            joined = np.concatenate([np.empty(0, np.int32), *arrays])
            found[name] = torch.from_numpy(joined)
            found[f"{name}_lengths"] = torch.tensor([*map(len, arrays)], dtype=torch.int32)
        return {_PREFIX + name: tensor for name, tensor in found.items()}

    def load(self, tensors: Mapping[str, Any]) -> None:
        """Take over what `tensors` wrote, of tensors or what gives them by slices; from a run
        without a history, nothing."""
        self._kept.clear()
        self._tables.clear()
        if _PREFIX + "steps" not in tensors:
            return

        def saved(name: str) -> Tensor:
            return tensors[_PREFIX + name][:]

        prompts, completions = (
            torch.split(saved(name), saved(f"{name}_lengths").tolist())
            for name in ("prompts", "completions")
        )
        rest = iter(completions)
        for number, count in saved("steps").tolist():
            self.add(prompts[number].tolist(), [each.numpy() for each in islice(rest, count)])

    def _all(self) -> Iterable[np.ndarray]:
        return (tokens for steps in self._kept.values() for step in steps for tokens in step)
