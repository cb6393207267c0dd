"""All that waits for a GPU, in one command: `python -m benchmarks.gpu_suite`.

Correctness at real shapes, then times beside others' code, as shares of the rates this GPU reaches
on plain matrix products and copies, then the tests marked gpu. It ends within nine minutes; vLLM's
larger sections are for calls of their own, `--only` with their names, which keep the others. A
section that fails is reported, with the tables it had finished, and the next one runs, in a new
process where the old one was lost; a time of an operator that is not correct is not taken. Results:
benchmarks/results/<gpu>/, h200 for an "NVIDIA H200" and h100-80gb-hbm3 for an "NVIDIA H100 80GB
HBM3", in gpu_suite.json, which is written after each section; and a short table at the end of the
output.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    gpu_attention,
    gpu_head,
    gpu_learner,
    gpu_operators,
    gpu_products,
    gpu_pytest,
    gpu_report,
    gpu_sections,
    gpu_timing,
    gpu_vllm,
    gpu_weights,
)
from benchmarks.run import RESULTS, machine_name

FILE = "gpu_suite.json"
TOTAL = 510.0
"""seconds, after which a section that still runs is stopped and none begins"""
LIMIT, TESTS_LIMIT = 110.0, 170.0
"""seconds a section may take before its process is ended; the tests end by themselves before"""
SOFT_LIMIT = 75.0
"""seconds into a section from when on it begins no further variant"""
RESERVE = 20.0
"""seconds a variant may take that began just before the end of `TOTAL`"""
WORKER = [sys.executable, "-m", "benchmarks.gpu_suite"]

SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "rates": gpu_sections.rates,
    "correct: rows": gpu_sections.correct_rows,
    "correct: head": gpu_head.correct_head,
    "correct: weights": gpu_weights.correct,
    "correct: attention": gpu_attention.correct_attention,
    "correct: optimizer": gpu_operators.correct_optimizer,
    "correct: layers": gpu_operators.correct_layers,
    "correct: advantages": gpu_operators.correct_advantages,
    "correct: head logprobs": gpu_operators.correct_head_logprobs,
    "correct: learner": gpu_learner.correct_learner,
    "linear_grpo_loss 3584": gpu_head.time_head_large,
    "weight_sync 1.5B": gpu_weights.time_small,
    "weight_sync 7B": gpu_weights.time_large,
    "flat_adamw": gpu_operators.time_optimizer,
    "group_advantages": gpu_operators.time_advantages,
    "token_logprobs": gpu_sections.time_token_logprobs,
    "grpo_loss": gpu_sections.time_grpo_loss,
    "linear_grpo_loss 1536": gpu_head.time_head_small,
    "prefix_attention": gpu_attention.time_attention,
    "layer_rows": gpu_operators.time_layers,
    "learner 1.5B": gpu_learner.time_learner,
    "gpu tests": gpu_pytest.gpu_tests,
    "linear_logprobs": gpu_operators.time_head_logprobs,
    "products": gpu_products.time_products,
    "other gpu tests": gpu_pytest.other_gpu_tests,
    "tiles": gpu_products.time_tiles,
    "attention tiles": gpu_attention.time_tiles,
} | gpu_vllm.sections()
"""what matters most, for its time, comes first: a run that is cut off has it"""
ON_DEMAND = gpu_vllm.on_demand()
"""those that run only when --only names them"""
SECTIONS |= ON_DEMAND
NEEDS = {
    "weight_sync 1.5B": "correct: weights",
    "weight_sync 7B": "correct: weights",
    "token_logprobs": "correct: rows",
    "grpo_loss": "correct: rows",
    "linear_grpo_loss 1536": "correct: head",
    "linear_grpo_loss 3584": "correct: head",
    "linear_logprobs": "correct: head logprobs",
    "products": "correct: head",
    "tiles": "correct: head",
    "flat_adamw": "correct: optimizer",
    "group_advantages": "correct: advantages",
    "prefix_attention": "correct: attention",
    "layer_rows": "correct: layers",
    "attention tiles": "correct: attention",
    "learner 1.5B": "correct: learner",
}
"""what must have held before a section takes times"""


def main() -> int:
    """0 when every section ran, every check held and every variant of ours was timed."""
    options = _options()
    if not torch.cuda.is_available():
        print("no CUDA device here; this suite has nothing to measure", file=sys.stderr)
        return 2
    out = options.out or RESULTS / machine_name("cuda")
    path = out / FILE
    if options.worker:
        return _work(path, options.only)
    out.mkdir(parents=True, exist_ok=True)
    gpu_report.write(path, _begun(gpu_report.read(path), options.only))
    _supervise(path, options.only)
    sections = {name: gpu_report.read(path)["sections"][name] for name in options.only}
    gpu_report.print_table(sections)
    return int(any(gpu_report.failure(name, found) for name, found in sections.items()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results")
    unasked = [name for name in SECTIONS if name not in ON_DEMAND]
    parser.add_argument("--only", nargs="+", default=unasked, choices=list(SECTIONS))
    # measures in this process; what `_supervise` starts
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _begun(earlier: dict[str, Any], only: list[str]) -> dict[str, Any]:
    """An empty record, or one with the other sections, if they were taken here at this commit."""
    machine, kept = gpu_report.machine(), {}
    if earlier.get("machine") == machine:
        kept = {name: found for name, found in earlier["sections"].items() if name not in only}
    return {"machine": machine, "began": time.time(), "sections": kept}


def _supervise(path: Path, only: list[str]) -> None:
    """Have all sections measured by as many processes as it takes.

    A kernel's illegal access ruins the process's CUDA context, and one that hangs cannot be
    stopped from inside; what comes after it would be lost.
    """
    while left := [name for name in only if name not in gpu_report.read(path)["sections"]]:
        command = [*WORKER, "--worker", "--out", str(path.parent), "--only", *left]
        child = subprocess.Popen(command, process_group=0)
        try:
            reason = _watch(child, path)
        finally:
            gpu_pytest.end_group(child)
        results = gpu_report.read(path)
        running = results.get("running", {}).get("section")
        if running:
            print(f"{running}: {reason}", flush=True)
            gpu_report.add(path, running, {"error": reason})
        elif not any(name in results["sections"] for name in left):
            for name in left:
                gpu_report.add(path, name, {"error": f"nothing could begin: {reason}"})


def _watch(child: subprocess.Popen, path: Path) -> str:
    """Why `child` has ended, or has to be ended."""
    while True:
        try:
            status = child.wait(0.5)
            return f"its process ended with status {status}"
        except subprocess.TimeoutExpired:
            results = gpu_report.read(path)
        if time.time() - results["began"] > TOTAL + RESERVE / 2:
            return "no time was left to end it"
        running = results.get("running")
        if running and time.time() - running["since"] > _limit(running["section"]):
            return f"stopped after {_limit(running['section']):.0f} s"


def _limit(section: str) -> float:
    return TESTS_LIMIT if "tests" in section else gpu_vllm.LIMITS.get(section, LIMIT)


def _work(path: Path, only: list[str]) -> int:
    """Measure section by section in this process, until one ruins it."""
    for section in only:
        results = gpu_report.read(path)
        needed = results["sections"].get(NEEDS.get(section), {})
        left = TOTAL - (time.time() - results["began"])
        if "error" in needed:
            gpu_report.add(path, section, {"error": f"not timed: {NEEDS[section]} failed"})
        elif left < RESERVE:
            gpu_report.add(path, section, {"error": "skipped: no time was left"})
        else:
            gpu_report.write(
                path, results | {"running": {"section": section, "since": time.time()}}
            )
            gpu_timing.keep = partial(gpu_report.keep, path)
            gpu_timing.deadline = time.monotonic() + min(SOFT_LIMIT, left - RESERVE)
            gpu_pytest.latest = time.monotonic() + left
            gpu_report.add(path, section, _run(section))
            if not _usable():
                return 1
    return 0


def _run(section: str) -> dict[str, Any]:
    start = time.monotonic()
    try:
        found = SECTIONS[section]()
    # what is broken here is a finding; the sections after it still have to be measured
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    # traces of errors hold tensors in cycles
    gc.collect()
    print(f"{section}: {time.monotonic() - start:.1f} s", flush=True)
    return found | {"seconds": round(time.monotonic() - start, 1)}


def _usable() -> bool:
    """Whether this process can still use the GPU."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"a new process goes on: {error}", flush=True)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
