"""Sections of the GPU suite: the tests that are marked gpu, in a process of their own."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KERNEL_TESTS = ("tests/kernels",)
OTHER_TESTS = ("tests/learner", "tests/rollout", "tests/integrations")
KERNEL_TESTS_LIMIT, OTHER_TESTS_LIMIT = 150.0, 90.0
"""seconds"""
WORKERS = 4
"""processes that share the tests, each of which takes whole files: most of the time goes into
compiling kernels one by one, and an illegal access takes no other file's tests with it"""
MOST_NAMED = 40
"""lines about tests that failed, in the results"""
latest = math.inf
"""by time.monotonic(): when tests end whatever their limit is"""


def gpu_tests() -> dict[str, Any]:
    """The kernels' tests that are marked gpu."""
    return run_tests(KERNEL_TESTS_LIMIT, *files(KERNEL_TESTS), workers=_workers())


def other_gpu_tests() -> dict[str, Any]:
    """Those of whatever uses the kernels: sampler, learner, other trainers."""
    return run_tests(OTHER_TESTS_LIMIT, *files(OTHER_TESTS), workers=_workers())


def files(paths: Iterable[str]) -> list[str]:
    """Those in these folders, or at these paths, that have tests which are marked gpu: to collect
    the others takes as long as compiling many a kernel."""
    found = []
    for path in (ROOT / each for each in paths):
        inside = sorted(path.rglob("test_*.py")) if path.is_dir() else [path]
        found += [str(each) for each in inside if "mark.gpu" in each.read_text()]
    return found


def _workers() -> int:
    """As many as there are processors for two threads of each."""
    return min(WORKERS, (os.cpu_count() or 1) // 2) if find_spec("xdist") else 1


def run_tests(limit: float, *paths: str, workers: int = 1) -> dict[str, Any]:
    """Their summary; an error where one failed, none passed, or they took longer than `limit`."""
    limit = min(limit, latest - time.monotonic())
    # a file that cannot be imported here, for want of another trainer say, must not hide the others
    options = ["-v", "--continue-on-collection-errors", "-m", "gpu"]
    if workers > 1:
        options += ["-n", str(workers), "--dist", "loadfile"]
    status, text = finished([sys.executable, "-m", "pytest", *options, *paths], limit)
    print(text[-3000:])
    lines = text.strip().splitlines() or ["no output"]
    wrong = [line for line in lines if re.search(r"\b(FAILED|ERROR)\b", line)][:MOST_NAMED]
    found: dict[str, Any] = {"failed": wrong} if wrong else {}
    if status is None:
        passed = len(re.findall(r" PASSED\b", text))
        return found | {"error": f"not done after {limit:.0f} s, {passed} passed: {lines[-1]}"}
    found["summary"] = lines[-1]
    passed = re.search(r"\b[1-9]\d* passed", lines[-1])
    # all of them skipped is no failure to pytest
    return found if passed and not status else found | {"error": lines[-1]}


def finished(
    command: list[str], limit: float, environment: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """Exit status of a command in this folder, None where it took longer than `limit` seconds, and
    what it said.

    Output goes to a file and the whole process group is ended: an engine or a compiler that was
    started there would hold a pipe open long after the command is gone.
    """
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=said,
            stderr=subprocess.STDOUT,
            process_group=0,
            env=os.environ | (environment or {}),
        )
        try:
            status = child.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end_group(child)
        said.seek(0)
        return status, said.read().decode(errors="replace")


def end_group(child: subprocess.Popen) -> None:
    """Kill `child`, started with process_group=0, and whatever it started there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
