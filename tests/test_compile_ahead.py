"""Compiling for the learner while the sampler is at work."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from polymath_fast import machine
from polymath_fast.kernels.cpu import jit, tiles
from polymath_fast.precision import choose_dtype, torch_dtype
from polymath_fast.run import compile_ahead

DTYPE = choose_dtype("auto", "cpu")[0]
LLAMA = {"model_type": "llama"}
COMPILED = """
import json, sys, threading
from numba.core.dispatcher import Dispatcher
from polymath_fast.precision import torch_dtype

asked, inside, compile_it = set(), threading.local(), Dispatcher.compile

def compiles(kernel, signature):
    depth = inside.depth = getattr(inside, "depth", 0) + 1
    if depth == 1:  # by Python, not by another kernel that is compiled
        asked.add(f"{kernel.__module__}.{kernel.__name__} {signature}")
    try:
        return compile_it(kernel, signature)
    finally:
        inside.depth = depth - 1

Dispatcher.compile = compiles
dtype = torch_dtype(sys.argv[1])
"""
AHEAD = """
from polymath_fast.run import compile_ahead
compile_ahead.compile_learner("random:tiny", dtype, taped=True)
print(json.dumps(sorted(asked)))
"""
NEEDED = """
from polymath_fast.config import Config
from polymath_fast.learner.packing import TrainingRow
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.step import Learner
from polymath_fast.models import resolve_model
from polymath_fast.rollout.tape import Tape
from polymath_fast.rollout.transformers_engine import TransformersEngine
from polymath_fast.rollout.types import SamplingOptions

policy = Policy(resolve_model("random:tiny", notify=lambda _: None), dtype=dtype)
tape = Tape(1000)
engine = TransformersEngine(policy, stop_token_ids=[2], tape=tape)
sampling = SamplingOptions(max_completion_length=30, temperature=1.0, seed=3)
tape.start_step()
found = engine.generate((5, 9, 17, 33), 12, sampling)
before = set(asked)
rows = [
    TrainingRow(
        prompt_ids=(5, 9, 17, 33),
        token_ids=each.token_ids,
        sampling_logprobs=each.sampling_logprobs,
        advantage=(-1.0, 2.0, 0.5)[number % 3],
        recorded=each.recorded,
    )
    for number, each in enumerate(found)
]
Learner(policy, Config(max_completion_length=30)).update(rows, 0)
print(json.dumps(sorted(asked - before)))
"""


def said(script: str) -> set[str]:
    command = [sys.executable, "-c", COMPILED + script, DTYPE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.skipif(not tiles.available(torch_dtype(DTYPE)), reason="nothing is compiled")
def test_what_an_update_over_the_tape_needs_is_compiled_ahead() -> None:
    needed = said(NEEDED)
    assert len(needed) > 8 and any("attention_gradient" in name for name in needed)
    assert needed <= said(AHEAD)


class Started:
    """What stands in for the processes: commands, what they run instead, who has claimed."""

    def __init__(self, folder: Path) -> None:
        self.commands: list[list[str]] = []
        self.processes: list[subprocess.Popen] = []
        self.instead = ["true"]
        self._folder, self._start = folder, subprocess.Popen

    def __call__(self, command: list[str], **options: object) -> subprocess.Popen:
        self.commands.append(command)
        self.processes.append(self._start(self.instead, **options))
        return self.processes[-1]

    def claim(self, purpose: str) -> Path | None:
        path = self._folder / purpose
        if path.exists():
            return None
        path.touch()
        return path


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Started:
    found = Started(tmp_path)
    monkeypatch.setattr(compile_ahead.subprocess, "Popen", found)
    monkeypatch.setattr(jit, "claim", found.claim)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    return found


def test_a_process_that_is_done_is_not_needed_again(started: Started) -> None:
    for taped in (True, True, False):
        with compile_ahead.begun(LLAMA, "cpu", DTYPE, taped=taped):
            started.processes[-1].wait()
    ways = [command[-3:] for command in started.commands]
    assert ways == [["random:tiny", DTYPE, "taped"], ["random:tiny", DTYPE, "plain"]]


@pytest.mark.parametrize("broken_off", [True, False])
def test_one_that_is_late_ends_with_the_run(started: Started, broken_off: bool) -> None:
    started.instead = ["sleep", "600"]
    for _ in range(2):
        with suppress(KeyboardInterrupt), compile_ahead.begun(LLAMA, "cpu", DTYPE, taped=True):
            if broken_off:
                raise KeyboardInterrupt
        assert started.processes[-1].poll() is not None
    # a run that was broken off may not have compiled the rest itself
    assert len(started.commands) == (2 if broken_off else 1)


@pytest.mark.parametrize(
    ("model_type", "device", "cores"),
    [("gemma", "cpu", 2), ("llama", "cuda", 2), ("llama", "cpu", 1)],
)
def test_where_it_would_not_help_nothing_is_started(
    started: Started, monkeypatch: pytest.MonkeyPatch, model_type: str, device: str, cores: int
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: cores)
    with compile_ahead.begun({"model_type": model_type}, device, DTYPE, taped=True):
        assert not started.commands


def test_a_claim_is_good_once_for_these_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit._anything._cache, "_cache_path", str(tmp_path / "new"))
    first = jit.claim("this")
    assert first is not None and first.exists()
    assert jit.claim("this") is None and jit.claim("that") is not None
    monkeypatch.setattr(jit, "_state", lambda: ("0" * 64, False))
    assert jit.claim("this") is not None
    monkeypatch.setattr(jit._anything._cache, "_cache_path", "/proc/nowhere")
    assert jit.claim("other") is None
