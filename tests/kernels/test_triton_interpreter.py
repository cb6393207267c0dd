"""Numerics of the Triton kernels without a GPU: `interpreted_*.py`, in processes of their own.

Triton decides at import whether it interprets, so the switch must not reach this process. One
processor is enough for each of them; all run at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

PARTS = {
    "head": (["head"], 14),
    "head_loss": (["head_loss", "head_memory"], 29),
    "rows": (["rows", "advantages", "weight_sync", "no_sync"], 55),
    "attention": (["attention", "bad_values"], 65),
    "layers": (["layers", "adamw"], 31),
}
"""the files, and the fewest cases; fewer mean that they were not collected as a whole"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """The folder of each part's report and output, and its process."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    started = {}
    for part, (names, _) in PARTS.items():
        folder = tmp_path_factory.mktemp(part)
        paths = [Path(__file__).with_name(f"interpreted_{name}.py") for name in names]
        report = f"--junitxml={folder / 'report.xml'}"
        with open(folder / "output", "w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-W", "ignore", report, *paths],
                env=environment,
                cwd=Path(__file__).parents[2],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        started[part] = folder, process
    yield started
    for _, process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("part", PARTS)
def test_kernels_in_the_interpreter(part: str, running: dict) -> None:
    folder, process = running[part]
    status = process.wait()
    assert status == 0, (folder / "output").read_text()[-8000:]
    suite = ElementTree.parse(folder / "report.xml").getroot().find("testsuite")
    assert int(suite.get("tests")) >= PARTS[part][1] and int(suite.get("skipped")) == 0
