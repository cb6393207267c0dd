"""A CPU learner's kernels, compiled by another process while the sampler starts and draws.

numba compiles one kernel after the other: nearly a minute for a step's on a machine that has not
run them before, half of it for the learner. What that process compiles is where this one looks
before it compiles anything. If it fails or is late, nothing is lost: this one compiles for itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from polymath_fast import machine

if TYPE_CHECKING:
    import torch

    from polymath_fast.learner.packing import TrainingRow
    from polymath_fast.learner.policy import Policy

FAMILIES = {
    "llama": "random:tiny",
    "qwen2": "random:tiny-qwen2",
    "qwen3": "random:tiny-qwen3",
}
"""a small model for each type that has all of these kernels"""
_PROMPT, _COMPLETIONS = (5, 9, 17), ((8, 21, 33), (7, 12, 40, 2))


@contextmanager
def begun(shape: dict[str, Any], device: str, dtype: str, *, taped: bool) -> Iterator[None]:
    """Inside, that process works, where there is a core for it and nobody had one for this before;
    its end comes at the end. `shape` holds the keys of the model's config.json, `taped` says that
    the sampler keeps its forward passes for the learner."""
    family = FAMILIES.get(shape["model_type"])
    if device != "cpu" or family is None or machine.cores() < 2:
        yield
        return
    from polymath_fast.kernels.cpu.jit import claim

    words = [family, dtype, "taped" if taped else "plain"]
    claimed = claim("-".join(words).replace(":", "-"))
    if claimed is None:
        yield
        return
    child = subprocess.Popen(
        [sys.executable, "-m", "polymath_fast.run.compile_ahead", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        process_group=0,  # Ctrl-C is for the run, which ends this one when it is done
    )
    try:
        yield
    except BaseException:
        if child.poll() is None:  # neither of the two may have compiled everything
            claimed.unlink(missing_ok=True)
        raise
    finally:
        child.kill()
        child.wait()


def compile_learner(family: str, dtype: torch.dtype, *, taped: bool) -> None:
    """One update in miniature."""
    from polymath_fast.config import Config
    from polymath_fast.learner.packing import TrainingRow
    from polymath_fast.learner.policy import Policy
    from polymath_fast.learner.step import Learner
    from polymath_fast.models import resolve_model

    policy = Policy(resolve_model(family, notify=lambda _: None), dtype=dtype)
    rows = [
        TrainingRow(
            prompt_ids=_PROMPT,
            token_ids=ids,
            sampling_logprobs=[-1.0] * len(ids),
            advantage=(-1) ** number,
        )
        for number, ids in enumerate(_COMPLETIONS)
    ]
    if taped:
        rows = _recorded(policy, rows)
    Learner(policy, Config(max_completion_length=8)).update(rows, 0)


def _recorded(policy: Policy, rows: list[TrainingRow]) -> list[TrainingRow]:
    """The rows, as a sampler with a tape of noise would have recorded them."""
    from dataclasses import replace

    import torch

    from polymath_fast.kernels.cpu.recorded_head import RecordedPredictions
    from polymath_fast.rollout.tape import Activations, Recorded
    from polymath_fast.rollout.tape_room import DecoderSizes

    sizes = DecoderSizes.of(policy.model.config.to_dict(), policy.head.weight.dtype)
    count = sum(len(row.token_ids) for row in rows)
    noise = Activations.empty(sizes, count)
    for tensor in noise:
        tensor.normal_()
    softmax = torch.full((count, sizes.vocab_width), 0.5, dtype=sizes.dtype)
    found, first = [], 0
    for row in rows:
        places = torch.arange(first, first + len(row.token_ids))
        facts = torch.full((len(places), 4), 0.5, dtype=torch.float64)
        predictions = RecordedPredictions(softmax, places, facts, temperature=1.0)
        recorded = Recorded(noise, places[:-1], weight_version=0, predictions=predictions)
        found.append(replace(row, recorded=recorded))
        first += len(places)
    return found


def main(family: str, dtype: str, way: str) -> None:
    """On one thread, behind everybody who has more urgent work."""
    from polymath_fast import environment

    os.nice(5)
    environment.prepare()
    import torch

    from polymath_fast.precision import torch_dtype

    torch.set_num_threads(1)
    compile_learner(family, torch_dtype(dtype), taped=way == "taped")


if __name__ == "__main__":
    main(*sys.argv[1:])
