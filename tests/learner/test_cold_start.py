"""A process that compiles the CPU kernels and one that finds them compiled learn the same bits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
CHILD = """
import hashlib, random, sys
import torch
from polymath_fast.config import Config
from polymath_fast.learner.packing import TrainingRow
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.step import Learner

torch.set_num_threads(1)
policy, draw = Policy(sys.argv[1]), random.Random(0)
learner = Learner(policy, Config(learning_rate=0.01))
for step in range(2):
    rows = [
        TrainingRow(
            prompt_ids=tuple(range(10)),
            token_ids=[draw.randrange(200) for _ in range(24)],
            sampling_logprobs=[-5.0] * 24,
            advantage=draw.gauss(0, 1),
        )
        for _ in range(32)
    ]
    learner.update(rows, step)
for name, tensor in learner.optimizer.tensors().items():
    print(name, hashlib.sha256(tensor.numpy().tobytes()).hexdigest())
"""


def test_the_first_run_rounds_as_all_later_ones(tiny_model, tmp_path):
    """The compiler fuses products and sums where it may, in one copy of a function and not in the
    other; a run that was resumed then differed from its first part in the last bits."""
    words = [sys.executable, "-c", CHILD, str(tiny_model)]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    said = [
        subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert said[0] == said[1] and said[0].count("\n") == 3
