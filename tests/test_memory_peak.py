"""The memory estimate against what a process really had resident."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from polymath_fast import memory, models
from polymath_fast.config import Config
from polymath_fast.precision import choose_dtype

pytestmark = pytest.mark.slow
SETTINGS = {"num_generations": 24, "groups_per_step": 1, "max_completion_length": 64}
SETTINGS |= {"temperature": 2.0}
CHILD = """
import json, random, sys
from pathlib import Path
import polymath_fast.train
from polymath_fast import models
from polymath_fast.config import Config
from polymath_fast.learner.packing import TrainingRow
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.step import Learner
from polymath_fast.monitor import peak_memory_gib
from polymath_fast.precision import choose_dtype
from polymath_fast.rollout.tape import Tape
from polymath_fast.rollout.tape_room import tape_rows
from polymath_fast.rollout.transformers_engine import TransformersEngine
from polymath_fast.rollout.types import SamplingOptions

config, prompt, draw = Config(**json.loads(sys.argv[2])), tuple(range(100, 160)), random.Random(0)
policy = Policy(sys.argv[1], gradient_checkpointing=config.gradient_checkpointing)
reference = Policy(sys.argv[1]) if config.beta else None
learner = Learner(policy, config, reference, lends=True)
shape = models.read_config(Path(sys.argv[1]))
where = {"engine": "transformers", "prompt_tokens": len(prompt), "device": "cpu"}
tape = Tape(tape_rows(shape, config, **where, dtype=choose_dtype("auto", "cpu")[0]))
engine = TransformersEngine(policy, stop_token_ids=[], tape=tape)
limits = {"max_completion_length": config.max_completion_length}
sampling = SamplingOptions(**limits, temperature=config.temperature)
# a second step adds 0.5 to 2 percent
tape.start_step()
with learner.lend():
    completions = engine.generate(prompt, config.num_generations, sampling)
rows = [
    TrainingRow(
        prompt_ids=prompt,
        token_ids=completion.token_ids,
        sampling_logprobs=completion.sampling_logprobs,
        advantage=draw.gauss(0, 1),
        recorded=completion.recorded,
    )
    for completion in completions
]
assert all((row.recorded is not None) == (tape.rows > 0) for row in rows)
learner.update(rows, 0)
print(peak_memory_gib())
"""


OPTIONS = {
    "plain": {"tape_gib": 0},
    "checkpointed": {"gradient_checkpointing": True},
    "taped": {},
    "with a reference, updated twice": {"beta": 0.04, "updates_per_batch": 2},
    "off-loaded": {"tape_gib": 0, "offload_optimizer": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_estimate_is_within_15_percent_of_the_peak(smollm2: Path, options: dict) -> None:
    settings = SETTINGS | options
    words = [sys.executable, "-c", CHILD, str(smollm2), json.dumps(settings)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr
    parts = memory.estimate(
        models.read_config(smollm2),
        Config(**settings),
        engine="transformers",
        prompt_tokens=60,
        device="cpu",
        dtype=choose_dtype("auto", "cpu")[0],
    )
    assert sum(parts.values()) == pytest.approx(float(done.stdout), rel=0.15)
