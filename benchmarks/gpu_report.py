"""What the GPU suite has found so far, as a file, and as a short table."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = (
    *("torch", "triton", "transformers", "vllm"),
    *("liger-kernel", "cut-cross-entropy", "trl", "verl"),
)
_OURS = re.compile(r"\b(ours|triton|cuda|grad_norm)\b")
_CANDIDATES = ("tiles", "attention tiles")
"""sections whose variants are ours, but may turn out not to fit"""


def read(path: Path) -> dict[str, Any]:
    """The file's content, or that of one which nothing has been written to."""
    return json.loads(path.read_text()) if path.is_file() else {"sections": {}}


def write(path: Path, results: dict[str, Any]) -> None:
    """Whole or not at all: the process may be killed at any time."""
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(aside, path)


def keep(path: Path, found: dict[str, Any]) -> None:
    """Put what the section that runs has so far into the file, in case it is ended."""
    results = read(path)
    results["running"]["found"] = found
    write(path, results)


def add(path: Path, section: str, found: dict[str, Any]) -> None:
    """Put the findings of a section, which runs no more, into the file, with what it had kept."""
    results = read(path)
    kept = results.pop("running", {}).get("found", {})
    results["sections"][section] = kept | found
    write(path, results)


def failure(section: str, found: dict[str, Any]) -> str | None:
    """Why the suite has not passed: an error, a variant of ours that did not run, or none did."""
    if "error" in found:
        return found["error"]
    rows = found.get("rows", [])
    broken = [row for row in rows if "error" in row]
    if rows and len(broken) == len(rows):
        return f"nothing ran: {broken[0]['error']}"
    ours = [row for row in broken if _OURS.search(row["what"]) and section not in _CANDIDATES]
    return f"{ours[0]['what']}: {ours[0]['error']}" if ours else None


def machine() -> dict[str, Any]:
    """What the numbers are taken on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": torch.cuda.get_device_name(),
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": _commit(),
        "sources": _sources(),
        "versions": versions,
    }


def _sources() -> str:
    """Tells two states of the code apart, also where a copy has no history."""
    found = hashlib.sha256()
    for folder in ("polymath_fast", "benchmarks", "csrc"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".h"):
                found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def _commit() -> str | None:
    """None for a copy without its history, or where there is no git."""
    try:
        run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() or None


def print_table(sections: dict[str, dict[str, Any]]) -> None:
    """A line for each time, value and failure."""
    print(f"\n{'what':58}{'ms':>9}{'p20-p80':>16}{'MiB':>8}{'share':>7}")
    for section, found in sections.items():
        if failed := failure(section, found):
            print(f"{section:58}FAILED {failed[:80]}")
        if "summary" in found:
            print(f"{section:58}{found['summary']}")
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
