"""An engine behind a socket: requests, completions, faults, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from served_engine import LOGPROBS, SAMPLING, Running

from polymath_fast.errors import EngineError, UserError
from polymath_fast.rollout import build_engine, choose_weight_sync
from polymath_fast.rollout.remote_engine import RemoteEngine
from polymath_fast.rollout.types import Completion, Request
from polymath_fast.rollout.wire import decode


def test_completions_come_back_as_they_were(running: Running) -> None:
    engine = running.start()
    groups = engine.generate_many([[1, 2], [3]], 2, SAMPLING)
    assert [[list(c.token_ids) for c in group] for group in groups] == [
        [[1, 2, 2**31 - 1]] * 2,
        [[3, 2**31 - 1]] * 2,
    ]
    (completion,) = engine.generate([7], 1, SAMPLING)
    assert completion.sampling_logprobs == LOGPROBS
    assert (completion.finish_reason, completion.weight_version) == ("stop", 0)
    engine.sleep()
    assert running.engines[0].asleep
    engine.wake()
    assert not running.engines[0].asleep


def test_requests_and_unfinished_completions_travel_whole(running: Running) -> None:
    engine = running.start()
    begun = Completion(
        token_ids=[5], sampling_logprobs=[-0.25], finish_reason="aborted", weight_version=-4
    )
    request = Request(prompt_ids=[1], n=2, needed=1, begun=[begun])
    first, second = (each.completion for each in engine.stream([request], SAMPLING))
    assert first.spans == ((-4, 0), (0, 1)) and second.spans == ((0, 0),)
    assert (first.token_ids, first.sampling_logprobs[0]) == ([5, 1, 2**31 - 1], -0.25)


def test_an_engine_that_dies_in_between_has_given_what_had_finished(running: Running) -> None:
    engine = running.start()
    stream = engine.stream([Request(prompt_ids=[1], n=2), Request(prompt_ids=[1], n=3)], SAMPLING)
    assert [next(stream)[:2], next(stream)[:2]] == [(0, 0), (0, 1)]
    with pytest.raises(EngineError, match="the other process failed: out of memory"):
        next(stream)


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda r: r.start(max_num_seqs=0), UserError, "--max-num-seqs 0: must be"),
        (lambda r: r.start().generate([1], 3, SAMPLING), EngineError, "out of memory"),
        (lambda r: r.start()._ask("done", "dance"), EngineError, "sent 'dance', expected"),
        (lambda r: r.start()._ask("taken", "push"), EngineError, "'push' before any weights"),
        (lambda r: r.start().weights.push([], 1), EngineError, "call weights.attach"),
    ],
)
def test_what_goes_wrong_there_is_said_here(
    running: Running, use: Callable[[Running], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        use(running)


def test_ipc_means_an_engine_in_another_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        RemoteEngine, "__init__", lambda self, folder, **settings: asked.update(settings)
    )
    sizes = {"max_model_len": 9, "max_num_seqs": 3, "stop_token_ids": [1], "device": "cpu"}
    sizes |= {"dtype": "float32"}
    engine = build_engine("vllm", model_dir=tmp_path, policy=None, weight_sync="ipc", **sizes)
    assert isinstance(engine, RemoteEngine)
    assert asked.items() >= sizes.items() and "weight_sync" not in asked
    assert choose_weight_sync("ipc", "vllm")[0] == "ipc"
    with pytest.raises(UserError, match="--weight-sync ipc: the model is quantised"):
        choose_weight_sync("ipc", "vllm", quantization="fp8")


def test_the_process_ends_with_its_parent() -> None:
    code = (
        "import os, socket, subprocess, sys\n"
        "ours, theirs = socket.socketpair()\n"
        "command = [sys.executable, '-m', 'polymath_fast.rollout.engine_process']\n"
        "child = subprocess.Popen([*command, str(theirs.fileno())], pass_fds=[theirs.fileno()])\n"
        "print(child.pid, flush=True)\n"
        "input()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}/cmdline").is_file() and time.monotonic() < deadline:
        if not Path(f"/proc/{child}/cmdline").read_bytes():  # a zombie that nobody reaped yet
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize(
    "data",
    [[], ["AA", "", "stop", 0], ["", "!", "stop", [[0, 0]]], [1, 2, 3, 4], ["", "", "stop", []]],
)
def test_broken_completions_are_engine_errors(data: list[Any]) -> None:
    with pytest.raises(EngineError, match="sent no completion"):
        decode(data)
