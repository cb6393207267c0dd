"""A whole step beside others': what becomes of a contender that fails, and what is reported."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import ablations, end_to_end
from benchmarks.step_job import Job

JOB = Job(generations=8, length=16)


@pytest.fixture
def contender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shell script that `measure` starts in the place of Python."""
    script = tmp_path / "contender"
    script.touch(mode=0o755)
    stand_in = SimpleNamespace(executable=str(script), stderr=sys.stderr)
    monkeypatch.setattr(end_to_end, "sys", stand_in)
    return script


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("echo noise; echo one >&2; echo OSError: full >&2; exit 3", "exit code 3: OSError: full"),
        ("kill -9 $$", "exit code -9: "),
        ("echo NO RESULT here", "exit code 0: "),
    ],
    ids=["raises", "is killed", "says nothing"],
)  # fmt: skip
def test_a_contender_without_a_result_is_an_error(contender: Path, body: str, error: str) -> None:
    contender.write_text(f"#!/bin/sh\n{body}\n")
    assert end_to_end.measure("TRL", JOB) == {"error": error}


def steps(*seconds: float) -> list[dict[str, float]]:
    return [
        {"step": each, "generate": each / 4, "learn": each / 2, "mean_length": 10.0, "prompt": 30}
        for each in seconds
    ]


def test_medians_leave_out_the_first_step_of_each_process(contender: Path) -> None:
    written = json.dumps({"steps": steps(100.0, 4.0, 8.0)})
    contender.write_text(f"#!/bin/sh\necho noise\necho 'RESULT {written}'\n")
    row = end_to_end.measure("ours", JOB)
    assert (row["step"], row["generate"], row["learn"], row["prompt"]) == (6.0, 1.5, 3.0, 30)
    assert row["tokens_per_s"] == 8 * 10 / 6
    assert row["learn_flops_per_s"] == 6 * end_to_end.PARAMETERS * 80 / 3
    assert row["peak_rss_gib"] > 0
    contender.write_text(f"#!/bin/sh\necho 'RESULT {json.dumps({'steps': steps(200.0, 9.0)})}'\n")
    both = end_to_end.measure("ours", JOB, row | {"peak_rss_gib": 7000.0})
    assert (both["step"], both["peak_rss_gib"], len(both["steps"])) == (8.0, 7000.0, 5)


def measured(step: float) -> dict[str, Any]:
    return {
        "step": step,
        "generate": step / 4,
        "learn": step / 2,
        "mean_length": 10.0,
        "tokens_per_s": 80 / step,
        "learn_flops_per_s": 1e12 / step,
        "peak_rss_gib": step / 8,
    }


def result(**contenders: dict[str, Any]) -> dict[str, Any]:
    return {
        "machine": {"name": "a machine"},
        "job": {"generations": 8, "length": 16},
        "dtype": "float32",
        "product, TFLOP/s": [0.4, 0.5, 0.6],
        "contenders": contenders,
    }


FAILED = {"error": "exit code 3: OSError: full"}


def test_a_failed_contender_has_a_row_and_no_ratio() -> None:
    found = result(ours=measured(4.0) | {"sync": 0.002}, TRL=FAILED, plain=measured(8.0))
    found["curves"] = {"length": [{"length": 32} | FAILED, {"length": 64} | measured(2.0)]}
    lines = end_to_end.markdown(found).splitlines()
    assert "| ours | 10 | 4.0 | 1.0 | 2.0 | 0.5 | 50.00 | 50% |" in lines
    assert "| plain | 10 | 8.0 | 2.0 | 4.0 | 1.0 | 100.00 | 25% |" in lines
    assert [line for line in lines if "TRL" in line] == [
        "| TRL | did not run: exit code 3: OSError: full | | | | |"
    ]
    assert [line for line in lines if line.startswith("*")] == [
        "* plain takes 2.0 times as long a token, 2.0 times as long a step, 2.0 times in the "
        "learner, and 2.0 times the memory.",
        "* The weight sync of ours takes 2.00 ms of that.",
    ]
    assert "| 32 | did not run: exit code 3: OSError: full | | | | |" in lines
    assert "| 64 | 10 | 2.0 | 0.5 | 1.0 | 0.2 |" in lines


def test_without_ours_there_is_nothing_to_compare_with() -> None:
    lines = end_to_end.markdown(result(ours=FAILED, TRL=measured(8.0))).splitlines()
    assert "| TRL | 10 | 8.0 | 2.0 | 4.0 | 1.0 | 100.00 | 25% |" in lines
    assert not [line for line in lines if line.startswith("*")]


def test_an_idea_with_a_setting_of_its_own_has_its_own_row_to_compare_with() -> None:
    jobs = end_to_end.ablated_jobs(JOB)
    idea = "no row without influence"
    (base,) = (name for name, job in jobs.items() if job == replace(jobs[idea], without=None))
    assert base == "all ideas, 32 groups of 2" and list(jobs).index(base) < list(jobs).index(idea)
    assert {name for name, job in jobs.items() if job.without} == set(ablations.ABLATIONS)
    for name, job in jobs.items():
        assert name in (base, idea) or replace(job, without=None) == JOB
