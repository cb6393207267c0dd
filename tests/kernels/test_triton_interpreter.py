"""Numerics of the Triton kernels without a GPU: `interpreted_*.py`, in processes of their own.

Triton decides at import whether it interprets, so the switch must not reach this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("triton")

PARTS = {
    "head": (["head", "layouts"], 30),
    "head_loss": (["head_loss", "head_memory"], 29),
    "rows": (["rows", "advantages", "weight_sync", "no_sync", "races"], 66),
    "attention": (["attention", "bad_values"], 65),
    "layers": (["layers", "adamw"], 31),
}
"""the files, and the fewest cases; fewer mean that they were not collected as a whole"""


@pytest.mark.parametrize("part", PARTS)
def test_kernels_in_the_interpreter(part: str, tmp_path: Path) -> None:
    names, fewest = PARTS[part]
    paths = [Path(__file__).with_name(f"interpreted_{name}.py") for name in names]
    report = tmp_path / "report.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "ignore", f"--junitxml={report}", *paths],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert int(suite.get("tests")) >= fewest and int(suite.get("skipped")) == 0
