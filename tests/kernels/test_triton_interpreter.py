"""Numerics of the Triton kernels without a GPU: `interpreted_*.py`, each in a process of its own.

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

FEWEST = {"interpreted_triton.py": 44, "interpreted_attention.py": 24, "interpreted_adamw.py": 8}
"""cases; fewer mean that the file was not collected as a whole"""


@pytest.mark.parametrize("cases", FEWEST)
def test_kernels_in_the_interpreter(cases: str, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    path = Path(__file__).with_name(cases)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "ignore", f"--junitxml={report}", path],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert int(suite.get("tests")) >= FEWEST[cases] and int(suite.get("skipped")) == 0
