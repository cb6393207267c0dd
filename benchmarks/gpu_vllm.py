"""Sections of the GPU suite: the learner and vLLM on one device, by each way of syncing weights.

A section is a process of its own, for an engine does not leave all of a device behind when it ends:
`python -m benchmarks.gpu_vllm JSON_OF_THE_JOB` prints one line of JSON. Without vLLM there are no
such sections.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks import gpu_pytest, gpu_sizes
from polymath_fast import models, precision, rollout
from polymath_fast.config import Config
from polymath_fast.learner.packing import TrainingRow
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.step import Learner
from polymath_fast.rollout.types import Completion, Request, SamplingOptions

STRATEGIES = ("alias", "copy", "ipc", "reload")
LARGE = ("alias", "copy")
"""whose times a model of 1.5B is started for, too"""
LIMIT = 105.0
"""seconds for a section"""
GAP = 0.05
"""nats between the log-probs of learner and engine, on average: two passes of bfloat16"""


@dataclass(frozen=True)
class Job:
    """One engine, one learner, one update."""

    strategy: str
    model: str
    device: str = "cuda"
    completions: int = 64
    length: int = 64
    prompt: int = 64
    repeats: int = 5
    kv_cache_gib: float = 2.0


def sections() -> dict[str, Callable[[], dict[str, Any]]]:
    """Name -> section; none where vLLM is not installed."""
    if find_spec("vllm") is None:
        return {}
    named = {f"vllm {each}": partial(_section, each, "vllm_model") for each in STRATEGIES}
    large = {f"vllm {each} 1.5B": partial(_section, each, "vllm_large_model") for each in LARGE}
    return named | large


def _section(strategy: str, size: str) -> dict[str, Any]:
    return run(Job(strategy, getattr(gpu_sizes.SIZES, size)))


def run(job: Job) -> dict[str, Any]:
    """The findings of `measure` in a process of its own, an error where it failed."""
    limit = min(LIMIT, gpu_pytest.latest - time.monotonic())
    command = [sys.executable, "-m", "benchmarks.gpu_vllm", json.dumps(asdict(job))]
    status, text = gpu_pytest.finished(command, limit, {"HF_HUB_OFFLINE": "1"})
    if status is None:
        return {"error": f"not done after {limit:.0f} s"}
    lines = text.strip().splitlines() or ["it said nothing"]
    try:
        return json.loads(lines[-1])
    except ValueError:
        print("\n".join(lines[-40:]))
        return {"error": f"its process ended with {lines[-1][:300]}"}


def measure(job: Job) -> dict[str, Any]:
    """Sample, learn from it, sync, sample again: what must hold, and what the sync takes.

    Values: seconds until the engine was ready; the gap between the log-probs of learner and engine
    before and after the update; milliseconds of a sync and, from its beginning on, until a first
    token, beside those of a first token alone.
    """
    folder = models.resolve_model(job.model, notify=lambda text: None)
    dtype = precision.choose_dtype("auto", job.device)[0]
    began = time.perf_counter()
    policy = Policy(folder, device=job.device, dtype=precision.torch_dtype(dtype))
    engine = rollout.build_engine(
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
    config = Config(max_completion_length=job.length, learning_rate=1e-4)
    with closing(engine):
        learner = Learner(policy, config, None, engine.weights.attach(policy.model))
        values = {"start s": time.perf_counter() - began}
        return _checked(job, _Pair(learner, engine, _prompt(job, policy)), values)


class _Pair:
    """Learner and engine, which ought to have the same weights."""

    def __init__(self, learner: Learner, engine: Any, prompt: tuple[int, ...]):
        self.learner, self.engine, self.prompt = learner, engine, prompt
        self.pushed = 0

    def sample(self, job: Job) -> list[Completion]:
        """The same ones every time, as long as the weights are the same."""
        sampling = SamplingOptions(max_completion_length=job.length, temperature=1.0, seed=7)
        return self.engine.generate(self.prompt, job.completions, sampling)

    def rows(self, completions: Sequence[Completion]) -> list[TrainingRow]:
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

    def gap(self, completions: Sequence[Completion]) -> float:
        """Mean difference of the log-probs of the two."""
        filled = self.learner.passes.with_logprobs(self.rows(completions), "old_logprobs")
        found = torch.tensor([x for row in filled for x in row.old_logprobs])
        told = torch.tensor([x for row in filled for x in row.sampling_logprobs])
        return float((found - told).abs().mean())

    def push(self) -> None:
        """The learner's weights to the engine, as a version of their own."""
        self.pushed += 1
        self.engine.weights.push(self.learner.policy.named_weights(), self.pushed)

    def first_token(self) -> None:
        """Of one completion; drawn, so that the device is done with all that came before."""
        request = Request(prompt_ids=self.prompt, n=1)
        with closing(self.engine.stream([request], SamplingOptions(max_completion_length=1))) as s:
            next(s)


def _checked(job: Job, pair: _Pair, values: dict[str, float]) -> dict[str, Any]:
    # or the second one alone would find the prompt in the prefix cache: a pass of fewer tokens,
    # which a GPU may round otherwise
    pair.first_token()
    first, again = pair.sample(job), pair.sample(job)
    values["gap before"] = pair.gap(first)
    pair.learner.update(pair.rows(first), 0)
    pair.push()
    pair.engine.weights.verify(pair.learner.policy.named_weights())
    updated = pair.sample(job)
    values["gap after"] = pair.gap(updated)
    wrong = [name for name in ("gap before", "gap after") if not values[name] <= GAP]
    if not _same(first, again):
        wrong.append("one seed drew other tokens the second time")
    if _same(first, updated):
        wrong.append("an update changed nothing that is sampled")
    if {c.weight_version for c in updated} != {1}:
        wrong.append("completions do not name the update")
    values |= _times(job, pair)
    return {"values": values} | ({"error": f"wrong: {', '.join(wrong)}"} if wrong else {})


def _times(job: Job, pair: _Pair) -> dict[str, float]:
    pair.first_token()
    alone = [_milliseconds(pair.first_token) for _ in range(job.repeats)]
    pushes, until = [], []
    for _ in range(job.repeats):
        pushes.append(_milliseconds(pair.push))
        until.append(pushes[-1] + _milliseconds(pair.first_token))
    names = ("sync ms", "sync and first token ms", "first token alone ms")
    return dict(zip(names, map(statistics.median, (pushes, until, alone)), strict=True))


def _milliseconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def _same(one: Sequence[Completion], other: Sequence[Completion]) -> bool:
    return [list(c.token_ids) for c in one] == [list(c.token_ids) for c in other]


def _prompt(job: Job, policy: Policy) -> tuple[int, ...]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randint(policy.config.vocab_size, (job.prompt,), generator=draw).tolist())


if __name__ == "__main__":
    print("\n" + json.dumps(measure(Job(**json.loads(sys.argv[1])))))
