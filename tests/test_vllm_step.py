"""The GPU suite's whole step with vLLM: what is made of what ours and TRL print."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from benchmarks import gpu_pytest, gpu_report, vllm_step
from benchmarks.step_job import Job

JOB = Job(model="random:tiny", generations=8, length=12, steps=4)


def printed(seconds: list[float], length: float, peak: float, **more: float) -> str:
    """Of a contender, among what libraries say."""
    steps = [
        {"step": s, "generate": s / 2, "learn": s / 4, "sync": s / 8, "mean_length": length} | more
        for s in seconds
    ]
    return f"noise\nRESULT {json.dumps({'steps': steps, 'peak_mib': peak})}\nshutting down\n"


OURS = printed([60.0, 1.0, 2.0, 3.0], 10.0, 100.0)
TRL = printed([90.0, 8.0, 7.0, 9.0], 5.0, 300.0)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int | None, str]]:
    """Contender -> status and output, instead of a process."""
    found: dict[str, tuple[int | None, str]] = {"ours, vLLM": (0, OURS), "TRL, vLLM": (0, TRL)}

    def finished(command: list[str], limit: float, environment: Mapping[str, str]) -> tuple:
        assert 0 < limit <= vllm_step.LIMIT and Job(**json.loads(command[-1])) == JOB
        return found[command[-2]]

    monkeypatch.setattr(gpu_pytest, "finished", finished)
    monkeypatch.setattr(vllm_step, "find_spec", lambda name: object())
    return found


def test_phases_and_ratios_without_first_steps(says: dict) -> None:
    found = vllm_step.compare(JOB)
    rows = {row["what"]: row for row in found["rows"]}
    assert rows["ours: step"] == {
        "what": "ours: step", "median": 2e3, "p20": 1e3, "p80": 3e3, "peak_mib": 100.0
    }  # fmt: skip
    assert [rows[f"TRL: {phase}"]["median"] for phase in vllm_step.PHASES] == [8e3, 4e3, 2e3, 1e3]
    assert found["values"] == {
        **{f"TRL / ours, {phase}": 4.0 for phase in vllm_step.PHASES},
        "TRL / ours, a token": 8.0,
        "TRL / ours, memory": 3.0,
    }


@pytest.mark.parametrize(
    ("status", "text", "error"),
    [
        (1, "noise\nValueError: no room\n", "its process ended with ValueError: no room"),
        (None, "noise\n", "not done after"),
        (0, printed([60.0, 1.0], 10.0, 1.0, skipped=1.0), "no step had an update"),
    ],
)
def test_a_contender_that_does_not_run_is_a_row(
    says: dict, status: int | None, text: str, error: str
) -> None:
    says["TRL, vLLM"] = (status, text)
    found = vllm_step.compare(JOB)
    assert found["rows"][-1]["what"] == "TRL: step" and error in found["rows"][-1]["error"]
    assert found["values"] == {} and gpu_report.failure("vllm step", found) is None
    says |= {"TRL, vLLM": (0, TRL), "ours, vLLM": (status, text)}
    assert error in gpu_report.failure("vllm step", vllm_step.compare(JOB))


def test_without_trl_there_is_a_row_that_says_so(
    says: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_step, "find_spec", lambda name: None)
    found = vllm_step.compare(JOB)
    assert found["rows"][-1] == {"what": "TRL: step", "error": "trl is not installed"}
    assert found["rows"][0]["median"] == 2e3
