"""Completions that a sampler records, and an update with them."""

from __future__ import annotations

from dataclasses import replace

import torch

from polymath_fast.config import Config
from polymath_fast.learner.packing import TrainingRow
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.step import Learner
from polymath_fast.models import resolve_model
from polymath_fast.rollout.tape import Tape
from polymath_fast.rollout.transformers_engine import TransformersEngine
from polymath_fast.rollout.types import Request, SamplingOptions

FAMILIES = ["random:tiny", "random:tiny-qwen2", "random:tiny-qwen3"]
PROMPTS = [(5, 9, 17, 33, 70), (8, 21)]
STOP = range(2, 10)  # ends most completions early, some at once


def policy_of(family: str, dtype: torch.dtype) -> Policy:
    return Policy(resolve_model(family, notify=lambda text: None), dtype=dtype)


def sampled(
    policy: Policy,
    tape: Tape,
    *,
    prompts=PROMPTS,
    n=24,
    length=30,
    temperature=1.0,
    stop=STOP,
    **options,
) -> list[TrainingRow]:
    """Completions of all prompts, with advantages, in the order in which they finish."""
    engine = TransformersEngine(policy, stop_token_ids=stop, tape=tape, **options)
    sampling = SamplingOptions(max_completion_length=length, temperature=temperature, seed=3)
    requests = [Request(prompt_ids=prompt, n=n) for prompt in prompts]
    rows = []
    for number, _, completion in engine.stream(requests, sampling):
        rows.append(
            TrainingRow(
                prompt_ids=prompts[number],
                token_ids=completion.token_ids,
                sampling_logprobs=completion.sampling_logprobs,
                advantage=(-1.0, 0.5, 1.5)[len(rows) % 3],
                recorded=completion.recorded,
            )
        )
    return rows


def recording(rows: int) -> Tape:
    tape = Tape(rows)
    tape.start_step()
    return tape


def update(policy: Policy, rows: list[TrainingRow], **settings) -> tuple[dict, torch.Tensor]:
    """Metrics and gradient of one update of a learner with the weights of `policy`."""
    own = Policy(policy.model_dir, dtype=policy.head.weight.dtype)
    own.model.load_state_dict(policy.model.state_dict())
    settings = {"tokens_per_microbatch": 120} | settings
    learner = Learner(own, Config(max_completion_length=30, **settings))
    seen, step = {}, learner.optimizer.step

    def spied(rate: float):
        seen["gradient"] = learner.optimizer.grad.clone()
        return step(0.0)

    learner.optimizer.step = spied
    return learner.update(rows, 0), seen["gradient"]


def plain(rows: list[TrainingRow]) -> list[TrainingRow]:
    return [replace(row, recorded=None) for row in rows]
