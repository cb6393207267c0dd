"""A learner and vLLM on one device, which ought to have the same weights."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polymath_fast import models, precision, rollout
from polymath_fast.config import Config
from polymath_fast.learner.flat_storage import FlatStorage
from polymath_fast.learner.packing import TrainingRow
from polymath_fast.learner.passes import Passes
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.step import Learner
from polymath_fast.models import random_models
from polymath_fast.rollout.types import Completion, Request, SamplingOptions

CHANGE = 1 + 2**-6
"""factor that makes another number of every bfloat16 but 0"""
_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True)
class Job:
    """One engine, one learner, one change of the weights."""

    strategy: str
    model: str
    """what --model takes; without `update` a family of `random_models`"""
    update: bool = True
    """an optimizer's, whose state a model of 7B has no room for; else the weights are multiplied"""
    device: str = "cuda"
    completions: int = 64
    length: int = 64
    prompt: int = 64
    repeats: int = 5
    kv_cache_gib: float = 2.0


class Pair:
    """Learner and engine; `learner` is None where weights are changed without one."""

    def __init__(
        self,
        policy: Policy,
        engine: Any,
        prompt: tuple[int, ...],
        passes: Passes,
        learner: Learner | None,
    ) -> None:
        self.policy, self.engine, self.prompt = policy, engine, prompt
        self.passes, self.learner = passes, learner
        self.pushed = 0

    def sample(self, job: Job) -> list[Completion]:
        """The same ones every time, as long as the weights are the same."""
        sampling = SamplingOptions(max_completion_length=job.length, temperature=1.0, seed=7)
        return self.engine.generate(self.prompt, job.completions, sampling)

    def gap(self, completions: Sequence[Completion]) -> float:
        """Mean difference of the log-probs of the two."""
        filled = self.passes.with_logprobs(self._rows(completions), "old_logprobs")
        found = torch.tensor([x for row in filled for x in row.old_logprobs])
        told = torch.tensor([x for row in filled for x in row.sampling_logprobs])
        return float((found - told).abs().mean())

    def update(self, completions: Sequence[Completion]) -> None:
        """The learner's weights become others."""
        if self.learner is None:
            self.change()
        else:
            self.learner.update(self._rows(completions), 0)

    @torch.no_grad()
    def change(self) -> None:
        """Every tensor of the learner becomes another one."""
        torch._foreach_mul_(list(self.policy.model.parameters()), CHANGE)

    def push(self) -> None:
        """The learner's weights to the engine, as a version of their own."""
        self.pushed += 1
        self.engine.weights.push(self.policy.named_weights(), self.pushed)

    def verify(self) -> None:
        """Raises EngineError where the engine's weights are not the learner's, bit by bit."""
        self.engine.weights.verify(self.policy.named_weights())

    def first_token(self) -> None:
        """Of one completion; drawn, so that the device is done with all that came before."""
        request = Request(prompt_ids=self.prompt, n=1)
        with closing(self.engine.stream([request], SamplingOptions(max_completion_length=1))) as s:
            next(s)

    def _rows(self, completions: Sequence[Completion]) -> list[TrainingRow]:
        """With advantages that no reward gave."""
        return [
            TrainingRow(
                prompt_ids=self.prompt,
                token_ids=completion.token_ids,
                sampling_logprobs=completion.sampling_logprobs,
                advantage=(1.0, -1.0)[i % 2],
            )
            for i, completion in enumerate(completions)
        ]


@contextmanager
def started(job: Job) -> Iterator[Pair]:
    """Both, with the same weights."""
    dtype = precision.choose_dtype("auto", job.device)[0]
    with tempfile.TemporaryDirectory() as scratch:
        if job.update:
            folder = models.resolve_model(job.model, notify=lambda text: None)
            policy = Policy(folder, device=job.device, dtype=precision.torch_dtype(dtype))
        else:
            folder = Path(scratch)
            policy = Policy.of(random_models.in_memory(job.model, dtype, job.device))
            drawn = _blank(policy.model, folder)
        with closing(_engine(job, folder, policy, dtype)) as engine:
            storage = engine.weights.attach(policy.model)
            config = Config(max_completion_length=job.length, learning_rate=1e-4)
            if job.update:
                learner = Learner(policy, config, None, storage)
                yield Pair(policy, engine, _prompt(job, policy), learner.passes, learner)
                return
            (storage or FlatStorage.of(policy.model)).adopt(policy.model)
            with torch.no_grad():
                torch._foreach_copy_(list(policy.model.parameters()), drawn)
            del drawn
            pair = Pair(policy, engine, _prompt(job, policy), Passes(policy, config), None)
            pair.push()
            yield pair


def _engine(job: Job, folder: Path, policy: Policy, dtype: str) -> Any:
    return rollout.build_engine(
        "vllm",
        model_dir=folder,
        policy=policy,
        stop_token_ids=[],
        max_model_len=job.prompt + job.length,
        max_num_seqs=job.completions,
        device=job.device,
        dtype=dtype,
        kv_cache_gib=job.kv_cache_gib,
        weight_sync=job.strategy,
        readable_weights=True,
    )


@torch.no_grad()
def _blank(model: nn.Module, folder: Path) -> list[torch.Tensor]:
    """Make zeros of all weights and a folder of these, for an engine to start from; returns what
    they were.

    The file of the weights is a hole: 7B of them take neither room on a disk nor time to write.
    """
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        span = [end, end + parameter.nbytes]
        shape, dtype = list(parameter.shape), _DTYPES[parameter.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
        end = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    model.config.architectures = [type(model).__name__]  # as the model's own save_pretrained does
    model.config.save_pretrained(folder)
    drawn = [parameter.detach().clone() for parameter in model.parameters()]
    torch._foreach_zero_(list(model.parameters()))
    return drawn


def _prompt(job: Job, policy: Policy) -> tuple[int, ...]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randint(policy.config.vocab_size, (job.prompt,), generator=draw).tolist())
