"""Operators beside others' code: one that is wrong is not timed, and what a result becomes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import registry, run
from benchmarks.case import Case

Run = Callable[..., tuple[int, Path]]


@pytest.fixture
def benchmarked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`python -m benchmarks.run` without the seconds that the machine's rates take."""
    monkeypatch.setattr(run, "gemm_rate", lambda device: 4e12)
    monkeypatch.setattr(run, "copy_rate", lambda device: 8e9)

    def benchmarked(operator: str) -> tuple[int, Path]:
        arguments = ["run", operator, "--repeats", "2", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", arguments)
        return run.main(), tmp_path

    return benchmarked


def read(folder: Path, operator: str) -> tuple[dict[str, Any], str]:
    return (
        json.loads((folder / f"{operator}.json").read_text()),
        (folder / f"{operator}.md").read_text(),
    )


def case(variants: dict[str, Callable[[], object]]) -> Case:
    return Case(
        shape={"N": 4}, variants=variants, baseline="theirs", check=lambda: {}, flops=8.0, bytes=2.0
    )


def test_an_operator_that_is_wrong_is_not_timed(
    benchmarked: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = registry.group_advantages
    monkeypatch.setattr(
        registry, "group_advantages", lambda rewards, size: 1.0001 * right(rewards, size)
    )
    status, folder = benchmarked("group_advantages")
    assert status == 1
    result, table = read(folder, "group_advantages")
    assert result["error"].startswith("advantage: error ")
    assert not {"variants", "errors", "baseline"} & {*result}
    assert f"WRONG: {result['error']}" in table and "| ours |" not in table
    assert not list(folder.glob("*.png"))


def test_an_operator_that_is_right_is_timed(benchmarked: Run) -> None:
    status, folder = benchmarked("group_advantages")
    assert status == 0
    result, table = read(folder, "group_advantages")
    ours, eager = result["variants"]["ours"], result["variants"]["eager"]
    assert ours["times faster than baseline"] == eager["median"] / ours["median"]
    assert eager["times faster than baseline"] == 1
    assert "| ours |" in table and "WRONG" not in table


def test_what_follows_a_wrong_operator_is_measured_and_the_run_fails(
    benchmarked: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> dict[str, float]:
        raise AssertionError("d_weight: error 1.0")

    called = []
    wrong = case({"ours": lambda: called.append("wrong"), "theirs": lambda: None})
    wrong.check = refuse
    right = case({"ours": lambda: called.append("right"), "theirs": lambda: None})
    cases = {"wrong": lambda device: wrong, "right": lambda device: right}
    monkeypatch.setattr(run, "OPERATORS", cases)
    status, folder = benchmarked("all")
    assert status == 1
    assert {*called} == {"right"}
    assert read(folder, "wrong")[0]["error"] == "d_weight: error 1.0"
    assert "error" not in read(folder, "right")[0]


@pytest.mark.parametrize("broken", ["ours", "another"])
def test_only_a_variant_of_ours_has_to_run(
    broken: str, benchmarked: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise TypeError("another version")

    variants = {"ours": lambda: None, "theirs": lambda: None, "another": lambda: None}
    monkeypatch.setattr(run, "OPERATORS", {"one": lambda device: case(variants | {broken: fail})})
    status, folder = benchmarked("one")
    assert status == (broken == "ours")
    result, table = read(folder, "one")
    assert "median" not in result["variants"][broken]
    assert f"| {broken} | did not run: TypeError: another version |" in table


RESULT = {
    "operator": "head",
    "shape": {"N": 4, "V": 10},
    "machine": {"name": "a machine"},
    "dtype": "float32",
    "rates": {"product, TFLOP/s": 0.5},
    "errors": {"logprob": 2e-6},
    "baseline": "theirs",
    "variants": {
        "ours": {
            "median": 2.0,
            "p20": 1.5,
            "p80": 2.5,
            "peak_mib": 7.0,
            "times faster than baseline": 3.0,
            "share of product rate": 0.4,
            "share of copy rate": 0.1,
        },
        "theirs": {
            "median": 6.0,
            "p20": 5.0,
            "p80": 8.0,
            "peak_mib": 90.0,
            "times faster than baseline": 1.0,
            "share of product rate": 0.0,
            "share of copy rate": 0.25,
        },
        "absent": {"error": "ImportError: none"},
    },
}


def test_a_table_for_people() -> None:
    assert run.markdown(RESULT).splitlines() == [
        "## head (N=4, V=10)",
        "",
        "a machine, float32",
        "",
        "| variant | median ms | p20 - p80 | x theirs | peak MiB | of rate |",
        "|---|---|---|---|---|---|",
        "| ours | 2.00 | 1.50 - 2.50 | 3.00 | 7 | 40% |",
        "| theirs | 6.00 | 5.00 - 8.00 | 1.00 | 90 | 25% |",
        "| absent | did not run: ImportError: none | | | | |",
        "",
        "Errors against fp64: logprob 2.0e-06. Machine: product, TFLOP/s 0.50.",
    ]


def test_bars_of_the_variants_that_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn, barh = [], Axes.barh

    def noted(self: Axes, names: list[str], lengths: list[float], **how: Any) -> object:
        drawn.append((names, lengths, how["xerr"]))
        return barh(self, names, lengths, **how)

    monkeypatch.setattr(Axes, "barh", noted)
    run.plot(RESULT, tmp_path / "head.png")
    assert drawn == [(["ours", "theirs"], [2.0, 6.0], [[0.5, 1.0], [0.5, 2.0]])]
    assert (tmp_path / "head.png").read_bytes().startswith(b"\x89PNG")
