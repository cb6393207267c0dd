"""What every contender of the whole-step benchmark is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """What every contender does `steps` times."""

    model: str = "embedded:smollm2"
    """that all of them train; what --model takes"""
    device: str = "cpu"
    generations: int = 64
    """completions of a group"""
    groups: int = 1
    """ours only"""
    length: int = 128
    prompt: int | None = None
    """tokens the prompt is filled up to; None = as long as it is"""
    steps: int = 3
    question: str = "What is 17 + 25? Think step by step and put the final answer within \\boxed{}."
    answer: str = "42"
    reward: str = "boxed_or_mentioned"
    """function of `step_reward`; ours only have another one"""
    without: str | None = None
    """name of an idea in `ablations` that is switched off"""
    full_length: bool = False
    """completions go on behind their end, so that two runs compute as many tokens; ours only"""


def question(job: Job) -> str:
    """The question, with a preface of as many tokens as the prompt is to have."""
    if job.prompt is None:
        return job.question
    from polymath_fast.samples import load_tokenizer

    tokenizer = load_tokenizer(model_folder(job))
    template = 30  # what the chat template adds
    own = len(tokenizer(job.question).input_ids) + template
    word = " sum"
    return word.strip() + word * max(0, job.prompt - own - 1) + ". " + job.question


def model_folder(job: Job) -> Path:
    """Of the model that all of them train."""
    from polymath_fast.models import resolve_model

    return resolve_model(job.model, notify=lambda text: None)
