"""A process that compiles the CPU kernels and one that finds them compiled learn the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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

OPERATORS = """
import hashlib
import torch
from polymath_fast import kernels

def tell(*tensors):
    flat = (t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
    print(hashlib.sha256(b"".join(flat)).hexdigest())

torch.set_num_threads(1)
draw = torch.Generator().manual_seed(1)
def made(*shape, dtype):
    return torch.randn(*shape, generator=draw).to(dtype).requires_grad_()

advantages, ends = torch.randn(3, generator=draw), torch.tensor([0, 11, 22, 33], dtype=torch.int32)
targets = torch.randint(999, (33,), generator=draw)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    logits = made(33, 4097, dtype=dtype)
    found = kernels.token_logprobs(logits * 3, targets, impl="cpu")
    (found[0].sum() + found[1].sum()).backward()
    tell(*found, logits.grad)
    out = kernels.grpo_loss(logits, targets, advantages, ends, impl="cpu")
    out.loss.backward()
    tell(out.loss, logits.grad)
for dtype in (torch.float32, torch.bfloat16):
    hidden, weight = made(33, 64, dtype=dtype), made(999, 64, dtype=dtype)
    out = kernels.linear_grpo_loss(hidden, weight, targets, advantages, ends, impl="cpu")
    out.loss.backward()
    tell(out.loss, out.logprobs, hidden.grad, weight.grad)
    q, k, v = (made(40, heads, 32, dtype=dtype) for heads in (4, 2, 2))
    offsets = torch.tensor([0, 15, 30], dtype=torch.int32)
    attended = kernels.prefix_attention(q, k, v, 10, offsets, impl="cpu")
    attended.float().square().sum().backward()
    tell(attended, q.grad, k.grad, v.grad)
grad = torch.randn(10_001, generator=draw)
tell(kernels.grad_norm(grad, impl="cpu"))
"""


def said(words: list[str], cache: Path) -> str:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout


def test_the_first_run_rounds_as_all_later_ones(tiny_model, tmp_path):
    """The compiler fuses products and sums where it may, in one copy of a function and not in the
    other; a run that was resumed then differed from its first part in the last bits."""
    words = [sys.executable, "-c", CHILD + OPERATORS, str(tiny_model)]
    first, later = (said(words, tmp_path) for _ in range(2))
    assert first == later and first.count("\n") == 3 + 11
