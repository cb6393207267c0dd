"""Our operators beside others' code: `python -m benchmarks.run <operator|all> [--device cpu|cuda]`.

An operator is checked against fp64 first; one that is wrong is not timed. Variants run in turn, so
ratios hold even where the machine is shared and absolute times do not. Results go to
benchmarks/results/<machine>/<operator>.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case
from benchmarks.registry import OPERATORS
from benchmarks.timing import copy_rate, gemm_rate, interleave
from polymath_fast.precision import choose_dtype

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numba", "triton", "liger-kernel", "cut-cross-entropy", "trl", "verl")
CPUINFO = Path("/proc/cpuinfo")
INSTRUCTION_SETS = {
    "AMX": "amx_bf16",
    "AVX512-BF16": "avx512_bf16",
    "AVX512": "avx512f",
    "AVX2": "avx2",
}
"""name -> flag of the processor, the fastest first"""


def main() -> int:
    """0 when every operator was right and every variant of ours ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operator", choices=[*OPERATORS, "all"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5, help="rounds in which all variants run")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; use --device cpu", file=sys.stderr)
        return 2
    out = options.out or RESULTS / machine_name(options.device)
    out.mkdir(parents=True, exist_ok=True)
    rates = {"gemm": gemm_rate(options.device), "copy": copy_rate(options.device)}
    names = list(OPERATORS) if options.operator == "all" else [options.operator]
    wrong = 0
    for name in names:
        case = OPERATORS[name](options.device)
        result = measure(name, case, options.device, options.repeats, rates)
        wrong += "error" in result or "error" in next(iter(result["variants"].values()))
        (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        table = markdown(result)
        (out / f"{name}.md").write_text(table)
        print(table, flush=True)
        if find_spec("matplotlib") and "variants" in result:
            plot(result, out / f"{name}.png")
    return int(wrong > 0)


def measure(
    name: str, case: Case, device: str, repeats: int, rates: dict[str, float]
) -> dict[str, Any]:
    """Everything about one operator, ready for JSON."""
    result: dict[str, Any] = {
        "operator": name,
        "shape": case.shape,
        "machine": machine(device),
        "dtype": choose_dtype("auto", device)[0],
        "rates": {"product, TFLOP/s": rates["gemm"] / 1e12, "copy, GB/s": rates["copy"] / 1e9},
    }
    try:
        result["errors"] = case.check()
    except AssertionError as error:
        return result | {"error": str(error)}
    timings = interleave(case.variants, device, repeats)
    baseline = timings[case.baseline].median
    rows = {}
    for variant, timing in timings.items():
        row: dict[str, Any] = timing.row()
        if timing.median is not None:
            seconds = 1e-3 * timing.median
            row["times faster than baseline"] = baseline / timing.median if baseline else None
            row["share of product rate"] = case.flops / seconds / rates["gemm"]
            row["share of copy rate"] = case.bytes_of(variant) / seconds / rates["copy"]
        rows[variant] = row
    return result | {
        "baseline": case.baseline,
        "flops": case.flops,
        "bytes": case.bytes,
        "variants": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    """A table for people."""
    shape = ", ".join(f"{name}={size}" for name, size in result["shape"].items())
    where = f"{result['machine']['name']}, {result['dtype']}"
    lines = [f"## {result['operator']} ({shape})", "", where, ""]
    if "error" in result:
        return "\n".join([*lines, f"WRONG: {result['error']}", ""])
    lines += [
        f"| variant | median ms | p20 - p80 | x {result['baseline']} | peak MiB | of rate |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["variants"].items():
        if "error" in row:
            lines.append(f"| {name} | did not run: {row['error']} | | | | |")
            continue
        share = row["share of product rate"] or row["share of copy rate"]
        ratio = row["times faster than baseline"]
        faster = "" if ratio is None else f"{ratio:.2f}"  # the baseline may not run here
        lines.append(
            f"| {name} | {row['median']:.2f} | {row['p20']:.2f} - {row['p80']:.2f} "
            f"| {faster} | {row['peak_mib']:.0f} | {share:.0%} |"
        )
    errors = ", ".join(f"{name} {error:.1e}" for name, error in result["errors"].items())
    rates = ", ".join(f"{name} {rate:.2f}" for name, rate in result["rates"].items())
    return "\n".join([*lines, "", f"Errors against fp64: {errors}. Machine: {rates}.", ""])


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of the medians with p20 and p80."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = {name: row for name, row in result["variants"].items() if "median" in row}
    medians = [row["median"] for row in rows.values()]
    spread = [
        [row["median"] - row["p20"] for row in rows.values()],
        [row["p80"] - row["median"] for row in rows.values()],
    ]
    colours = ["#2a7f62" if name.startswith("ours") else "#9aa5b1" for name in rows]
    figure, axes = pyplot.subplots(figsize=(7, 0.5 * len(rows) + 1), layout="constrained")
    axes.barh(list(rows), medians, xerr=spread, color=colours)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(result["operator"])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def machine(device: str) -> dict[str, Any]:
    """What the numbers were taken on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "name": _hardware(device),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine_name(device: str) -> str:
    """A folder name: the GPU, or the processor, its generation, instruction set and number of
    cores; clouds give processors of several generations one name."""
    return re.sub(r"[^a-z0-9]+", "-", _hardware(device).lower()).strip("-")


def instruction_set(flags: set[str]) -> str:
    """The one that decides how fast matrix products are; processors of one name differ in it.

    flags: as Linux names what a processor can do.
    """
    return next((name for name, flag in INSTRUCTION_SETS.items() if flag in flags), "")


def _hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name().removeprefix("NVIDIA ")
    facts = {"model name": torch.backends.cpu.get_cpu_capability(), "flags": ""}
    if CPUINFO.exists():
        for line in CPUINFO.read_text().split("\n\n", 1)[0].splitlines():
            name, _, value = line.partition(":")
            facts[name.strip()] = value.strip()
    extensions = instruction_set(set(facts["flags"].split()))
    generation = f"family {facts['cpu family']}" if "cpu family" in facts else ""
    parts = [facts["model name"], generation, extensions, f"{torch.get_num_threads()} threads"]
    return ", ".join(part for part in parts if part)


if __name__ == "__main__":
    sys.exit(main())
