"""A whole training step beside TRL's and beside a plain loop: `python -m benchmarks.end_to_end`.

Same model, sample, reward, number and length of rollouts, one update a step. Every contender runs
in a process of its own, in turn, so that peak memory is its own and ratios belong to one run. Ours
runs again after the others: what a shared machine has left changes within minutes.
--curves generations prompt length adds how a step grows with these; --ablations switches each idea
off in turn; an empty --contenders leaves the contenders out.
Results: benchmarks/results/<machine>/end_to_end.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.run import RESULTS, machine, machine_name
from benchmarks.step_job import Job
from benchmarks.step_workers import CONTENDERS
from benchmarks.timing import gemm_rate
from polymath_fast.precision import choose_dtype

OURS = "ours"
PARAMETERS = 134_515_008  # SmolLM2-135M, tied head counted once
MOST_STEPS = {"TRL": 2}
"""of a contender whose steps take minutes"""
CURVES = {
    "generations": [64, 128, 256, 512, 1024],
    "prompt": [64, 128, 256, 512, 1024, 2048],
    "length": [32, 64, 128, 256, 512],
}
CURVE_JOBS = {
    "generations": Job(length=32, steps=2, full_length=True),
    "prompt": Job(generations=128, steps=2, full_length=True),
    "length": Job(generations=64, steps=2, full_length=True),
}


def main() -> int:
    """0 when every contender ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="the first one is left out")
    parser.add_argument("--contenders", nargs="*", default=[*CONTENDERS, OURS])
    parser.add_argument("--curves", nargs="*", default=[], choices=list(CURVES))
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or RESULTS / machine_name("cpu")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "end_to_end.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result["machine"] = machine("cpu")
    job = Job(generations=options.generations, length=options.length, steps=options.steps)
    if options.contenders:
        rates: list[float] = []
        fresh: dict[str, dict[str, Any]] = {}
        for name in options.contenders:
            steps = min(job.steps, MOST_STEPS.get(name, job.steps))
            rates.append(gemm_rate("cpu"))
            fresh[name] = measure(name, replace(job, steps=steps), fresh.get(name))
        result["contenders"] = result.get("contenders", {}) | fresh
        result["job"] = asdict(job)
        rates.append(gemm_rate("cpu"))
        result["product, TFLOP/s"] = [rate / 1e12 for rate in rates]
        result["dtype"] = choose_dtype("auto", "cpu")[0]
    for axis in options.curves:
        curve = result.setdefault("curves", {})
        curve[axis] = [
            {axis: size} | measure(OURS, replace(CURVE_JOBS[axis], **{axis: size}))
            for size in CURVES[axis]
        ]
    if options.ablations:
        result["ablated job"] = asdict(job)
        result["ablations"] = {
            name: measure(OURS, ablated) for name, ablated in ablated_jobs(job).items()
        }
    path.write_text(json.dumps(result, indent=1) + "\n")
    (out / "end_to_end.md").write_text(markdown(result))
    print(markdown(result))
    plot(result, out)
    failed = [name for name, row in result.get("contenders", {}).items() if "error" in row]
    return int(bool(failed))


def ablated_jobs(job: Job) -> dict[str, Job]:
    """Name of a row -> what is measured for it: all ideas, and one less; where an idea has a
    setting of its own, all of them in that first."""
    from benchmarks.ablations import ABLATIONS, SETTINGS

    jobs = {"all ideas": job}
    for name in ABLATIONS:
        own = replace(job, **SETTINGS.get(name, {}))
        if own != job:
            sizes = f"{own.groups} groups of {own.generations}"
            jobs[f"all ideas, {sizes}"] = own
        jobs[name] = replace(own, without=name)
    return jobs


def measure(name: str, job: Job, earlier: dict[str, Any] | None = None) -> dict[str, Any]:
    """Medians of a contender's steps but the first of each of its processes, and their peak memory;
    with those of an `earlier` measurement."""
    command = [sys.executable, "-m", "benchmarks.step_workers", name, json.dumps(asdict(job))]
    print(f"{name}: {asdict(job)}", file=sys.stderr, flush=True)
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        text = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        last = errors.read().strip().splitlines()[-1:]
    lines = [line for line in text.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {"error": f"exit code {child.returncode}: {''.join(last)[:200]}"}
    steps = json.loads(lines[-1].removeprefix("RESULT "))["steps"]
    steps[0]["first"] = True
    earlier = earlier or {}
    steps = earlier.get("steps", []) + steps
    counted = [each for each in steps if not (each.get("first") or each.get("skipped"))]
    counted = counted or steps[-1:]
    row = {
        key: statistics.median(step[key] for step in counted)
        for key in ("step", "generate", "learn", "sync", "mean_length")
        if key in counted[-1]
    }
    tokens = job.groups * job.generations * row["mean_length"]
    return row | {
        "tokens_per_s": tokens / row["step"],
        "learn_flops_per_s": 6 * PARAMETERS * tokens / row["learn"],
        "peak_rss_gib": max(usage.ru_maxrss / 2**20, earlier.get("peak_rss_gib", 0)),
        "prompt": steps[-1].get("prompt"),
        "steps": steps,
    }


def markdown(result: dict[str, Any]) -> str:
    """Tables for people."""
    lines = [f"# A whole step on {result['machine']['name']}", ""]
    if "contenders" in result:
        lines += _contenders(result)
    for axis, points in result.get("curves", {}).items():
        lines += [f"## Growth with {axis}", ""]
        lines += [f"| {axis} | mean length | step s | generate s | learn s | peak GiB |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [_row(str(point[axis]), point) for point in points] + [""]
    if "ablations" in result:
        lines += [
            "## One idea less",
            "",
            f"{result['ablated job']['generations']} completions of at most "
            f"{result['ablated job']['length']} tokens.",
            "",
            "| without | mean length | step s | generate s | learn s |",
        ]
        lines[-1] += " peak GiB |"
        lines += ["|---|---|---|---|---|---|"]
        lines += [_row(name, row) for name, row in result["ablations"].items()] + [""]
    return "\n".join(lines)


def _contenders(result: dict[str, Any]) -> list[str]:
    job, rows = result["job"], result["contenders"]
    rate = 1e12 * statistics.median(result["product, TFLOP/s"])
    lines = [
        f"One prompt, {job['generations']} completions of at most {job['length']} tokens, one "
        f"update, SmolLM2-135M in {result['dtype']}; medians without first steps. Times per "
        "token are what to compare: each contender draws its own completions. Between their "
        f"processes torch's product ran at {_listed(result['product, TFLOP/s'])} TFLOP/s; shares "
        "are of the median.",
        "",
        "| | mean length | step s | generate s | learn s | peak GiB | ms a token | learner's share "
        "of the product rate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        line = _row(name, row)
        if "error" not in row:
            line += f" {1e3 / row['tokens_per_s']:.2f} | {row['learn_flops_per_s'] / rate:.0%} |"
        lines.append(line)
    base = rows.get(OURS, {"error": True})
    if "error" not in base:
        lines.append("")
        for name, row in rows.items():
            if name != OURS and "error" not in row:
                lines.append(
                    f"* {name} takes {base['tokens_per_s'] / row['tokens_per_s']:.1f} times as "
                    f"long a token, {row['step'] / base['step']:.1f} times as long a step, "
                    f"{row['learn'] / base['learn']:.1f} times in the learner, and "
                    f"{row['peak_rss_gib'] / base['peak_rss_gib']:.1f} times the memory."
                )
        lines += [
            f"* The weight sync of {name} takes {1e3 * row['sync']:.2f} ms of that."
            for name, row in rows.items()
            if "sync" in row
        ]
    return [*lines, ""]


def _listed(rates: list[float]) -> str:
    return ", ".join(f"{rate:.1f}" for rate in rates)


def _row(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {name} | did not run: {row['error']} | | | | |"
    return (
        f"| {name} | {row['mean_length']:.0f} | {row['step']:.1f} | {row['generate']:.1f} "
        f"| {row['learn']:.1f} | {row['peak_rss_gib']:.1f} |"
    )


def plot(result: dict[str, Any], out: Path) -> None:
    """Bars of the contenders' phases and a panel for each curve."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    curves = result.get("curves", {})
    figure, axes = pyplot.subplots(
        1, 1 + len(curves), figsize=(5 + 4 * len(curves), 3.4), layout="constrained", squeeze=False
    )
    rows = {n: r for n, r in result.get("contenders", {}).items() if "error" not in r}
    bars, *panels = axes[0]
    names, learn = list(rows), [row["learn"] for row in rows.values()]
    bars.barh(names, learn, color="#2a7f62", label="learn")
    drawn = [row["generate"] for row in rows.values()]
    bars.barh(names, drawn, left=learn, color="#9aa5b1", label="generate")
    bars.invert_yaxis()
    bars.set_xlabel("seconds a step")
    bars.legend()
    for panel, (axis, points) in zip(panels, curves.items(), strict=True):
        sizes = [point[axis] for point in points]
        for key, colour in (("step", "#1f2933"), ("generate", "#9aa5b1"), ("learn", "#2a7f62")):
            panel.plot(sizes, [point.get(key) for point in points], "o-", color=colour, label=key)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xlabel(axis)
        panel.set_ylabel("seconds")
        panel.legend()
    figure.savefig(out / "end_to_end.png", dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
