"""Drafts from history for vLLM, through its door for proposers of one's own (`custom_class`).

vLLM verifies them by rejection sampling: the distribution of every token is the model's, but which
tokens are drawn depends on what was drafted. A run is repeated exactly with the same history.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polymath_fast.rollout.speculation import Drafter, Speculation


def options(most: int) -> dict[str, Any]:
    """What vLLM's engine is started with, to draft up to `most` tokens."""
    return {
        "speculative_config": {
            "method": "custom_class",
            "model": f"{__name__}.{HistoryProposer.__name__}",
            "num_speculative_tokens": most,
        },
        "async_scheduling": False,  # drafts need the tokens of the step before
    }


class HistoryProposer:
    """What vLLM asks for drafts after every pass. vLLM makes it from its name; `attach` it then."""

    def __init__(self, vllm_config: object):
        self._speculation = Speculation()
        self._request_ids: Callable[[], Sequence[str]] = list
        self._stop: frozenset[int] = frozenset()
        self._drafted: dict[str, tuple[int, list[int]]] = {}
        self.start([], 0)

    def attach(
        self,
        speculation: Speculation,
        request_ids: Callable[[], Sequence[str]],
        stop_token_ids: Sequence[int],
    ) -> None:
        """Draft from `speculation`; `request_ids()` names the rows of the present batch."""
        self._speculation, self._request_ids = speculation, request_ids
        self._stop = frozenset(stop_token_ids)

    def start(self, prompts: Sequence[Sequence[int]], limit: int) -> None:
        """Completions of these prompts follow, of at most `limit` tokens."""
        self._prompts = {tuple(prompt_ids) for prompt_ids in prompts}
        self._lengths = sorted({len(prompt_ids) for prompt_ids in self._prompts}, reverse=True)
        self._limit = limit
        self._drafter = Drafter(self._speculation)
        self._drafted.clear()

    def load_model(self, *args: object) -> None:
        """There is none."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: object = None,
    ) -> list[list[int]]:
        """A draft for each row of the batch.

        Args:
            sampled_token_ids: what the last pass added to each row; nothing while it is prefilled.
            num_tokens_no_spec: (rows or more,) tokens of each row, prompt included.
            token_ids_cpu: (rows or more, longest) those tokens.
        """
        count = len(sampled_token_ids)
        ends = num_tokens_no_spec[:count].tolist()
        names = list(self._request_ids())[:count]
        self._tally(names, ends, sampled_token_ids)
        drafts: list[list[int]] = [[] for _ in range(count)]
        if len(names) == count and self._speculation.begins(count):
            texts = [token_ids_cpu[i, :end].tolist() for i, end in enumerate(ends)]
            prompts = [self._prompt_of(text) for text in texts]
            rows = [i for i in range(count) if sampled_token_ids[i] and prompts[i]]
            self._draft(rows, prompts, texts, drafts)
            self._drafted = {names[i]: (ends[i], drafts[i]) for i in rows if drafts[i]}
        return drafts

    def _draft(
        self,
        rows: list[int],
        prompts: list[tuple[int, ...]],
        texts: list[list[int]],
        drafts: list[list[int]],
    ) -> None:
        if not rows:
            return
        drawn = [texts[i][len(prompts[i]) :] for i in rows]
        asked = [prompts[i] for i in rows]
        self._drafter.learn(sum(map(len, drawn)), lambda: zip(asked, drawn, strict=True))
        room = np.array([self._limit - 1 - len(tokens) for tokens in drawn])
        for i, draft in zip(rows, self._drafter.drafts(asked, drawn, room), strict=True):
            drafts[i] = draft

    def _prompt_of(self, text: list[int]) -> tuple[int, ...]:
        """The longest prompt that `text` begins with; () where there is none."""
        for length in self._lengths:
            if tuple(text[:length]) in self._prompts:
                return tuple(text[:length])
        return ()

    def _tally(self, names: list[str], ends: list[int], sampled: list[list[int]]) -> None:
        """Count how the drafts of the last call did in the pass that followed it."""
        for name, end, tokens in zip(names, ends, sampled, strict=False):
            start, draft = self._drafted.get(name, (-1, []))
            if not tokens or start != end - len(tokens):  # vLLM left it out of the pass
                continue
            cut = next((i + 1 for i, token in enumerate(tokens) if token in self._stop), 0)
            stands = tokens[: cut or len(tokens)]
            # Unless a stop token ends it, the last token is drawn freely.
            checked = stands if cut else stands[:-1]
            pairs = zip(checked, draft, strict=False)
            right = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            accepted = min(len(checked), len(draft)) if right is None else right
            self._speculation.count(len(draft), accepted, len(stands))
        self._drafted = {}


def verify_by_torch() -> None:
    """Let vLLM's CPU builds verify drafts at the temperature they are sampled at.

    In 0.32 the compiled kernel that gives each drafted token its completion's temperature reads it
    as a whole number and writes into a copy, so that the distribution is divided by whatever the
    memory held. Four lines of torch do the same rightly.
    """
    from vllm.v1.sample import rejection_sampler

    if not callable(getattr(rejection_sampler, "expand_batch_to_tokens", None)):
        raise RuntimeError("vLLM's rejection sampler is not that of the tested versions")
    rejection_sampler.expand_batch_to_tokens = _expand


def _expand(
    x: Tensor,
    cu_num_tokens: Tensor,
    num_tokens: int,
    replace_from: float = 0,
    replace_to: float = 0,
) -> Tensor:
    """x (B,) once for each token of a completion -> (num_tokens,), one value replaced."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    x = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return x.repeat_interleave(counts, output_size=num_tokens)
