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
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from typing import Any

from benchmarks import gpu_pytest, gpu_sizes, vllm_pushes, vllm_step
from benchmarks.vllm_pair import Job, Pair, started
from polymath_fast.rollout.types import Completion

STRATEGIES = ("alias", "copy", "ipc", "reload")
LARGE = ("alias", "copy")
"""whose times a model of 1.5B is started for, too, unasked"""
LIMIT, LARGEST_LIMIT = 105.0, 160.0
"""seconds for a section, and for one of 7B"""
STEP = "vllm step"
LIMITS = {f"vllm {each} 7B": LARGEST_LIMIT + 5 for each in STRATEGIES} | {STEP: vllm_step.LIMIT + 5}
"""seconds after which the suite ends a section that takes longer than others may"""
GAP = 0.05
"""nats between the log-probs of learner and engine, on average: two passes of bfloat16"""

Sections = dict[str, Callable[[], dict[str, Any]]]


def sections() -> Sections:
    """Name -> section; none where vLLM is not installed."""
    if find_spec("vllm") is None:
        return {}
    small = {f"vllm {each}": partial(_section, each, "vllm_model") for each in STRATEGIES}
    return small | {f"vllm {each} 1.5B": _large(each) for each in LARGE}


def on_demand() -> Sections:
    """Those that run only where they are named: together they take as long as all the others."""
    if find_spec("vllm") is None:
        return {}
    large = {f"vllm {each} 1.5B": _large(each) for each in STRATEGIES if each not in LARGE}
    largest = {
        f"vllm {each} 7B": partial(_section, each, "large_model", update=False)
        for each in STRATEGIES
    }
    return large | largest | {STEP: vllm_step.step}


def _large(strategy: str) -> Callable[[], dict[str, Any]]:
    return partial(_section, strategy, "vllm_large_model")


def _section(strategy: str, size: str, **how: Any) -> dict[str, Any]:
    return run(Job(strategy, getattr(gpu_sizes.SIZES, size), **how))


def run(job: Job) -> dict[str, Any]:
    """The findings of `measure` in a process of its own, an error where it failed."""
    limit = LIMIT if job.update else LARGEST_LIMIT
    limit = min(limit, gpu_pytest.latest - time.monotonic())
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
    before and after the update; milliseconds of a first token alone; what `vllm_pushes` finds.
    """
    began = time.perf_counter()
    with started(job) as pair:
        return _checked(job, pair, {"start s": time.perf_counter() - began})


def _checked(job: Job, pair: Pair, values: dict[str, float]) -> dict[str, Any]:
    # or the second one alone would find the prompt in the prefix cache: a pass of fewer tokens,
    # which a GPU may round otherwise
    pair.first_token()
    first, again = pair.sample(job), pair.sample(job)
    values["gap before"] = pair.gap(first)
    pair.update(first)
    pair.push()
    pair.verify()
    updated = pair.sample(job)
    values["gap after"] = pair.gap(updated)
    wrong = [name for name in ("gap before", "gap after") if not values[name] <= GAP]
    if not _same(first, again):
        wrong.append("one seed drew other tokens the second time")
    if _same(first, updated):
        wrong.append("an update changed nothing that is sampled")
    if {c.weight_version for c in updated} != {pair.pushed}:
        wrong.append("completions do not name the update")
    pair.first_token()
    alone = [_milliseconds(pair.first_token) for _ in range(job.repeats)]
    values["first token alone ms"] = statistics.median(alone)
    found = vllm_pushes.measure(job, pair)
    found["values"] = values | found["values"]
    return found | ({"error": f"wrong: {', '.join(wrong)}"} if wrong else {})


def _milliseconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def _same(one: Sequence[Completion], other: Sequence[Completion]) -> bool:
    return [list(c.token_ids) for c in one] == [list(c.token_ids) for c in other]


if __name__ == "__main__":
    print("\n" + json.dumps(measure(Job(**json.loads(sys.argv[1])))))
