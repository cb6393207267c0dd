"""`benchmarks.gpu_suite` without a GPU: every section runs, and what goes wrong is noticed.

`gpu_rehearsal.py` runs the suite's own main() with tiny inputs, in processes of its own, because
Triton decides at import whether it interprets.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_double
import pytest

from benchmarks import (
    gpu_learner,
    gpu_pytest,
    gpu_report,
    gpu_sizes,
    gpu_suite,
    gpu_timing,
    gpu_vllm,
)
from benchmarks.timing import late

pytest.importorskip("triton")

PASSING = "import pytest\n\n@pytest.mark.gpu\ndef test_it():\n    pass\n"
SKIPPED = "import pytest\n\n@pytest.mark.gpu\n@pytest.mark.skip\ndef test_it():\n    pass\n"
ORPHAN = """
import subprocess, sys, time, pytest

@pytest.mark.gpu
def test_first():
    pass

@pytest.mark.gpu
def test_wrong():
    assert False

@pytest.mark.gpu
def test_it():
    # holds the output open when pytest is gone
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    time.sleep(3600)
"""
RIVALS = ("flex attention", "liger", "cce", "verl")
"""whose code needs CUDA in one place or another, if it is installed at all"""


BROKEN = "wrong logprobs,wrong norm,dies,hangs,ruined"
ONLY = (
    *("rates", "correct: rows", "correct: optimizer", "correct: advantages"),
    *("flat_adamw", "group_advantages", "token_logprobs", "grpo_loss"),
    *("gpu tests", "products", "weight_sync 1.5B"),
)


def begin(
    folder: Path, *arguments: str, tests: str = PASSING, faults: str = ""
) -> subprocess.Popen:
    """The suite at work; its results and what it says come into the folder."""
    path = folder / "test_on_a_gpu.py"
    path.write_text(tests)
    root = gpu_report.ROOT
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(root),
        "REHEARSAL_TESTS": str(path),
        "REHEARSAL_FAULTS": faults,
    }
    script, out = root / "tests" / "gpu_rehearsal.py", folder / "results"
    with open(folder / "said", "w") as said:
        return subprocess.Popen(
            [sys.executable, script, "--out", out, *arguments],
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
        )


@pytest.fixture(scope="module")
def rehearsals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Both at once, on a processor each: folders and processes."""
    whole, broken = (tmp_path_factory.mktemp(name) for name in ("whole", "broken"))
    started = {
        "whole": (whole, begin(whole)),
        "broken": (broken, begin(broken, "--only", *ONLY, tests=SKIPPED, faults=BROKEN)),
    }
    yield started
    for _, process in started.values():
        process.send_signal(signal.SIGINT)  # it ends its own children
        process.wait()


def end(folder: Path, process: subprocess.Popen) -> tuple[int, dict[str, Any], str]:
    """Exit status, sections and output of the suite."""
    status = process.wait(timeout=500)
    said, written = (folder / "said").read_text(), folder / "results" / gpu_suite.FILE
    assert written.is_file(), said[-5000:]
    return status, json.loads(written.read_text())["sections"], said


@pytest.mark.slow
def test_every_section_runs(rehearsals: dict[str, Any]) -> None:
    status, sections, said = end(*rehearsals["whole"])
    rest = gpu_vllm.sections() | gpu_vllm.on_demand()
    assert list(sections) == [name for name in gpu_suite.SECTIONS if name not in rest]
    for name, found in sections.items():
        assert "error" not in found, f"{name}: {found['error']}\n{said[-5000:]}"
        assert found.get("rows") or found.get("values") or found.get("summary"), name
        for row in found.get("rows", ()):
            if "error" in row:
                assert any(rival in row["what"] for rival in RIVALS), f"{name}: {row}"
            else:
                assert row["median"] > 0, f"{name}: {row}"
        assert f"\n{name} " in said, "not in the table"
    assert status == 0
    heads = [row["what"] for row in sections["linear_grpo_loss 3584"]["rows"]]
    assert {"N=8 triton on-policy", "N=8 eager", "N=12 triton on-policy"} <= set(heads)
    weights = [row["what"] for row in sections["weight_sync 7B"]["rows"]]
    assert {"bf16 to bf16 cuda", "fp32 to bf16 triton"} <= set(weights)
    ours, unfused, rival, *trl = sections["learner 1.5B"]["rows"]
    assert ours["what"] == "ours, one update" and "padded, 2 completions" in rival["what"]
    ratios = sections["learner 1.5B"]["values"]
    if find_spec("trl"):
        assert trl[0]["what"] == "trl, padded, 2 completions" and trl[0]["flops"] == rival["flops"]
        assert ratios["trl / ours, a token"] == pytest.approx(2 * trl[0]["median"] / ours["median"])
    # 16 tokens beside 12 and 8
    assert ratios["layers not fused / ours, a token"] == pytest.approx(
        16 / 12 * unfused["median"] / ours["median"]
    )
    assert ratios["transformers / ours, a token"] == pytest.approx(
        2 * rival["median"] / ours["median"]
    )
    assert ours["flops"] == 2 * rival["flops"]


def test_what_goes_wrong_is_noticed_and_the_rest_goes_on(rehearsals: dict[str, Any]) -> None:
    status, sections, said = end(*rehearsals["broken"])
    assert status == 1
    errors = {name: found.get("error", "") for name, found in sections.items()}
    assert "illegal memory access" in errors["rates"]
    assert "a new process goes on" in said
    assert "logprob error" in errors["correct: rows"]
    assert "norm" in errors["correct: optimizer"]
    for name, needed in (
        ("token_logprobs", "correct: rows"),
        ("grpo_loss", "correct: rows"),
        ("flat_adamw", "correct: optimizer"),
    ):
        assert errors[name] == f"not timed: {needed} failed" and "rows" not in sections[name]
    assert "status 9" in errors["group_advantages"]
    assert "skipped" in errors["gpu tests"]
    assert "stopped after 5 s" in errors["products"]
    # what it had by then
    assert [row["what"] for row in sections["products"]["rows"]] == ["triton"]
    assert sections["weight_sync 1.5B"]["rows"] and not errors["weight_sync 1.5B"]
    assert not errors["correct: advantages"]


def test_a_later_run_keeps_other_sections_of_the_same_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "machine", lambda: {"gpu": "one", "commit": "a"})
    earlier = {"machine": {"gpu": "one", "commit": "a"}, "sections": {"rates": {}, "tiles": {}}}
    assert list(gpu_suite._begun(earlier, ["tiles"])["sections"]) == ["rates"]
    earlier["machine"]["commit"] = "b"
    assert not gpu_suite._begun(earlier, ["tiles"])["sections"]


def test_tests_that_never_end(tmp_path: Path) -> None:
    path = tmp_path / "test_on_a_gpu.py"
    path.write_text(ORPHAN)
    found = gpu_pytest.run_tests(5.0, str(path))
    assert found["error"].startswith("not done after 5 s, 1 passed")
    assert len(found["failed"]) == 1 and "test_wrong" in found["failed"][0]


def test_processes_share_the_files_of_tests(tmp_path: Path) -> None:
    for name, text in (("one", PASSING), ("other", PASSING + "\n    assert False\n")):
        (tmp_path / f"test_{name}.py").write_text(text)
    found = gpu_pytest.run_tests(120.0, str(tmp_path), workers=2)
    assert "1 failed, 1 passed" in found["summary"] and found["error"] == found["summary"]
    assert "test_other.py" in found["failed"][0]


def test_files_without_a_gpu_test_are_not_collected(tmp_path: Path) -> None:
    inner = tmp_path / "inner" / "test_on_a_gpu.py"
    inner.parent.mkdir()
    inner.write_text(PASSING)
    (tmp_path / "test_elsewhere.py").write_text("import a_trainer_that_is_not_installed\n")
    assert gpu_pytest.files([str(tmp_path)]) == gpu_pytest.files([str(inner)]) == [str(inner)]
    ours = [Path(path).name for path in gpu_pytest.files(gpu_pytest.KERNEL_TESTS)]
    assert "test_triton_gpu.py" in ours and "test_bad_inputs.py" not in ours


def test_files_that_cannot_be_imported_hide_no_others(tmp_path: Path) -> None:
    (tmp_path / "test_elsewhere.py").write_text("import a_trainer_that_is_not_installed\n")
    (tmp_path / "test_here.py").write_text(PASSING)
    found = gpu_pytest.run_tests(60.0, str(tmp_path))
    assert "1 passed" in found["summary"] and "1 error" in found["error"]


def test_a_variant_that_fails_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def fails_later() -> None:
        calls.append("later")
        if len(calls) > 2:
            raise RuntimeError("out of memory")

    def make() -> None:
        raise ImportError("another version")

    with gpu_double.installed():
        variants = {"fine": lambda: None, "later": fails_later, "rival": late(make)}
        found = gpu_timing.interleave(variants, repeats=3)
        assert found["fine"].median is not None and found["fine"].error is None
        assert found["later"].error == "RuntimeError: out of memory"
        assert found["later"].median is None and found["later"].peak_mib is None
        assert found["rival"].error == "ImportError: another version"
        monkeypatch.setattr(gpu_timing, "deadline", time.monotonic() - 1)
        assert "not begun" in gpu_timing.interleave(variants)["fine"].error


def test_an_update_that_would_not_end_in_time_is_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[int] = []

    class Slow:
        def __init__(self, *given: object) -> None:
            pass

        def update(self, rows: list[object], step: int) -> None:
            begun.append(len(rows))
            time.sleep(0.05)

    sizes = replace(gpu_sizes.SIZES, learner_model="tiny", update=(2, 500, 2))
    monkeypatch.setattr(gpu_sizes, "SIZES", sizes)
    monkeypatch.setattr(gpu_learner, "Learner", Slow)
    rows = gpu_learner.random_rows(sizes.update, 320)
    first = 2 * [sizes.completions_at_once + 1]
    with gpu_double.installed():
        for left, calls in ((-9.0, first), (60.0, [*first, 500])):
            begun.clear()
            monkeypatch.setattr(gpu_timing, "deadline", time.monotonic() + left)
            try:
                gpu_learner._ours(rows)()
            except TimeoutError as error:
                assert "not begun: an update would take" in str(error)
            assert begun == calls
        monkeypatch.setattr(gpu_timing, "deadline", time.monotonic() - 1)
        begun.clear()
        assert "time was up" in gpu_timing.once(lambda: gpu_learner._ours(rows)).error
        assert not begun


def test_what_counts_as_a_failure() -> None:
    bad, good = {"what": "N=1 triton", "error": "no"}, {"what": "eager", "median": 1.0}
    rival = {"what": "liger", "error": "no"}
    assert gpu_report.failure("grpo_loss", {"rows": [bad, good]}) == "N=1 triton: no"
    assert gpu_report.failure("grpo_loss", {"rows": [rival, good]}) is None
    assert gpu_report.failure("tiles", {"rows": [bad, good]}) is None
    assert gpu_report.failure("tiles", {"rows": [bad]}) == "nothing ran: no"
    assert gpu_report.failure("rates", {"error": "late"}) == "late"
