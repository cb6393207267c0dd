"""Rows to be shared, and the rule that shares all that can be."""

from __future__ import annotations

import torch

from polymath_fast.learner.packing import TrainingRow
from polymath_fast.learner.prefix_tree import Rule

EVERY = Rule(shortest=1)
PROMPTS = [(5, 9, 17, 33, 70), (8, 21)]


def row(prompt, tokens, advantage=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TrainingRow(
        prompt_ids=tuple(prompt),
        token_ids=tokens,
        sampling_logprobs=(-5 - torch.rand(len(tokens), generator=generator)).tolist(),
        advantage=advantage,
    )
