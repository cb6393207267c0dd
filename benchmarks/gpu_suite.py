"""All that waits for a GPU, in one command: `python -m benchmarks.gpu_suite`.

Tests marked gpu, correctness at real shapes, then times beside others' code, as shares of the rates
this GPU reaches on plain matrix products and copies. Under nine minutes on an H200. A section that
fails is reported and the next one runs; a time of an operator that is not correct is not taken.
Results: benchmarks/results/<gpu>/gpu_suite.json, and a short table at the end of the output.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_attention, gpu_operators, gpu_products, gpu_sections, gpu_weights

ROOT = Path(__file__).parents[1]
BUDGET = 440.0
"""seconds; a section that would begin later is skipped, and says so. None takes longer than 90 s
but the kernels' tests, which come early"""
PACKAGES = ("torch", "triton", "transformers", "vllm", "liger-kernel", "cut-cross-entropy", "trl")

SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "rates": gpu_sections.rates,
    "correct: rows": gpu_sections.correct_rows,
    "correct: head": gpu_sections.correct_head,
    "correct: weights": gpu_weights.correct,
    "correct: attention": gpu_attention.correct_attention,
    "correct: optimizer": gpu_operators.correct_optimizer,
    "correct: advantages": gpu_operators.correct_advantages,
    "correct: head logprobs": gpu_operators.correct_head_logprobs,
    "gpu tests": gpu_sections.gpu_tests,
    "linear_grpo_loss 3584": gpu_sections.time_head_large,
    "linear_grpo_loss 1536": gpu_sections.time_head_small,
    "prefix_attention": gpu_attention.time_attention,
    "grpo_loss": gpu_sections.time_grpo_loss,
    "flat_adamw": gpu_operators.time_optimizer,
    "token_logprobs": gpu_sections.time_token_logprobs,
    "linear_logprobs": gpu_operators.time_head_logprobs,
    "other gpu tests": gpu_sections.other_gpu_tests,
    "weight_sync 1.5B": gpu_weights.time_small,
    "weight_sync 7B": gpu_weights.time_large,
    "group_advantages": gpu_operators.time_advantages,
    "products": gpu_products.time_products,
    "tiles": gpu_products.time_tiles,
    "attention tiles": gpu_attention.time_tiles,
}
"""what matters most comes first: a run that is cut off has it"""
NEEDS = {
    "weight_sync 1.5B": "correct: weights",
    "weight_sync 7B": "correct: weights",
    "token_logprobs": "correct: rows",
    "grpo_loss": "correct: rows",
    "linear_grpo_loss 1536": "correct: head",
    "linear_grpo_loss 3584": "correct: head",
    "linear_logprobs": "correct: head logprobs",
    "flat_adamw": "correct: optimizer",
    "group_advantages": "correct: advantages",
    "prefix_attention": "correct: attention",
    "attention tiles": "correct: attention",
}
"""what must have held before a section takes times"""


def main() -> int:
    """0 when every section ran and every check held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--only", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here; this suite has nothing to measure", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name().removeprefix("NVIDIA ").lower().replace(" ", "-")
    out = options.out or ROOT / "benchmarks" / "results" / name
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": _machine(), "sections": {}}
    start = time.monotonic()
    for section in options.only:
        needed = NEEDS.get(section)
        if needed in options.only and "error" in results["sections"][needed]:
            results["sections"][section] = {"error": f"not timed: {needed} failed"}
        else:
            results["sections"][section] = _run(section, time.monotonic() - start)
        (out / "gpu_suite.json").write_text(json.dumps(results, indent=1) + "\n")
    _print_table(results["sections"])
    return int(any("error" in found for found in results["sections"].values()))


def _run(section: str, elapsed: float) -> dict[str, Any]:
    if elapsed > BUDGET:
        return {"error": f"skipped: {elapsed:.0f} s were spent already"}
    start = time.monotonic()
    try:
        found = SECTIONS[section]()
    # what is broken here is a finding; the sections after it still have to be measured
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    torch.cuda.empty_cache()
    print(f"{section}: {time.monotonic() - start:.1f} s", flush=True)
    return found | {"seconds": round(time.monotonic() - start, 1)}


def _machine() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": torch.cuda.get_device_name(),
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": commit or None,
        "versions": versions,
    }


def _print_table(sections: dict[str, dict[str, Any]]) -> None:
    print(f"\n{'what':58}{'ms':>9}{'p20-p80':>16}{'MiB':>8}{'share':>7}")
    for section, found in sections.items():
        if "error" in found:
            print(f"{section:58}FAILED {found['error'][:80]}")
        for row in found.get("rows", ()):
            label = f"{section} {row['what']}"[:57]
            if "error" in row:
                print(f"{label:58}{row['error'][:60]}")
                continue
            spread = f"{row['p20']:.2f}-{row['p80']:.2f}"
            share = f"{row['share']:.0%}" if "share" in row else ""
            print(f"{label:58}{row['median']:9.2f}{spread:>16}{row['peak_mib']:8.0f}{share:>7}")
        for what, value in found.get("values", {}).items():
            print(f"{section + ' ' + what:58}{value:>9.3g}")


if __name__ == "__main__":
    sys.exit(main())
