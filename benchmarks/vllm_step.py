"""A section of the GPU suite: a whole step with vLLM, ours and TRL's, on one model and sample."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from statistics import fmean
from typing import Any

from benchmarks import gpu_pytest, gpu_sizes, gpu_timing
from benchmarks.gpu_timing import Timing
from benchmarks.step_job import Job

LIMIT = 300.0
"""seconds for both"""
PHASES = ("step", "generate", "learn", "sync")
"""of which learning has the sync in it, and generating the rewards"""


def step() -> dict[str, Any]:
    """128 completions of 256 tokens by a random Qwen2.5-1.5B, one update, four times."""
    model = gpu_sizes.SIZES.vllm_large_model
    return compare(Job(model=model, device="cuda", generations=128, length=256, steps=4))


def compare(job: Job) -> dict[str, Any]:
    """Rows of each phase (ms; the first step is left out) with the memory of its process, and how
    many times as long, and as much, TRL takes. What cannot run here is a row that says why."""
    end = time.monotonic() + min(LIMIT, gpu_pytest.latest - time.monotonic())
    ours = _measured("ours, vLLM", job, (end - time.monotonic()) / 2)
    rows = _rows("ours", ours)
    gpu_timing.keep({"rows": rows})
    if find_spec("trl") is None:
        trl: dict[str, Any] = {"error": "trl is not installed"}
    else:
        trl = _measured("TRL, vLLM", job, end - time.monotonic())
    values = {} if "error" in ours or "error" in trl else _ratios(trl, ours)
    return {"rows": rows + _rows("TRL", trl), "values": values}


def _measured(name: str, job: Job, limit: float) -> dict[str, Any]:
    """What a contender prints, without its first step; an error where it prints no result."""
    command = [sys.executable, "-m", "benchmarks.step_workers", name, json.dumps(asdict(job))]
    status, text = gpu_pytest.finished(command, limit, {"HF_HUB_OFFLINE": "1"})
    lines = text.strip().splitlines() or ["it said nothing"]
    told = [line for line in lines if line.startswith("RESULT ")]
    if told:
        found = json.loads(told[-1].removeprefix("RESULT "))
        counted = [each for each in found["steps"][1:] if not each.get("skipped")]
        return found | {"steps": counted} if counted else {"error": "no step had an update"}
    print("\n".join(lines[-40:]))
    if status is None:
        return {"error": f"not done after {limit:.0f} s"}
    return {"error": f"its process ended with {lines[-1][:300]}"}


def _timings(found: dict[str, Any]) -> dict[str, Timing]:
    timings = {phase: Timing(peak_mib=found.get("peak_mib", 0.0)) for phase in PHASES}
    for phase, timing in timings.items():
        timing.take([1e3 * each[phase] for each in found["steps"]])
    return timings


def _rows(name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    if "error" in found:
        return [{"what": f"{name}: step", "error": found["error"]}]
    return [
        {"what": f"{name}: {phase}"} | timing.row() for phase, timing in _timings(found).items()
    ]


def _ratios(trl: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    theirs, own = _timings(trl), _timings(ours)
    values = {f"TRL / ours, {name}": theirs[name].median / own[name].median for name in PHASES}
    # each contender draws its own completions
    lengths = [fmean(step["mean_length"] for step in found["steps"]) for found in (ours, trl)]
    values["TRL / ours, a token"] = values["TRL / ours, step"] * lengths[0] / lengths[1]
    if own["step"].peak_mib:
        values["TRL / ours, memory"] = theirs["step"].peak_mib / own["step"].peak_mib
    return values
