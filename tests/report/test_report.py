"""The report holds the right numbers, also of runs that are unfinished or lack pieces."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from report_pages import make_run, metrics, report

from polymath_fast.errors import UserError
from polymath_fast.report import charts, write_report
from polymath_fast.report.completions import spread


def test_curves_hold_the_values_of_the_metrics(tmp_path):
    page, _ = report(make_run(tmp_path))
    rows = [metrics(step) for step in range(1, 9)]
    for label, key in (
        ("reward", "reward/mean"),
        ("mean length", "completion/mean_length"),
        ("largest", "sampling/logprob_diff_max"),
        ("gradient norm", "policy/grad_norm"),
        ("generate", "time/generate"),
    ):
        assert page.series[label] == [[row["step"], pytest.approx(row[key])] for row in rows], label
    assert page.series["entropy"] == [[s, pytest.approx(1 / s, rel=1e-4)] for s in range(1, 9)]
    assert page.series["held"] == [[0, 0.075], [8, 0.375]]
    assert "eval/held/pass@4" in page.text and "eval/held/correct" not in page.text
    assert page.series["rest"] == [[s, pytest.approx(10 - 4 - 0.5 - 4.5)] for s in range(1, 9)]
    assert page.series["latest"] == [[s, s] for s in range(1, 9)] or "custom/thing" in page.text


def test_first_screen_says_what_the_sample_did(tmp_path):
    page, text = report(make_run(tmp_path))
    words = " ".join(page.text.split())
    last_four = sum(1 - 0.8**step for step in range(5, 9)) / 4
    assert "org/tiny" in words and "8 steps" in words
    assert f"0.20\u2192{last_four:.2f}first step, then mean of the last 4" in words
    assert "7.5%\u219237.5%" in words and "3/40 then 15/40" in words
    assert "404 tok/s" in words  # median of 401 ... 408 is 404.5, rounded half to even
    assert "1:20" in words and "peak 1.5 GiB" in words
    assert "What is 2+2?" in words and "answer 4" in words
    assert '<span class="special">&lt;|im_start|&gt;</span>' in text


def test_best_worst_and_random_of_each_step(tmp_path):
    page, text = report(make_run(tmp_path))
    views = re.split(r'<div class="step" data-step="(\d+)">', text)[1:]
    assert views[::2] == [str(step) for step in range(1, 9)]
    for step, view in zip(views[::2], views[1::2], strict=True):
        shown = re.findall(r"<b>(\w+)</b>.*?reward (\S+?)<.*?i(\d)</pre>", view, re.DOTALL)
        assert shown[:2] == [("best", "1", "1"), ("worst", "0", "3")], step
        assert shown[2][0] == "random"


@pytest.mark.parametrize(
    "harm",
    [
        lambda d: (d / "config.toml").unlink(),
        lambda d: (d / "config.toml").write_text("model = "),
        lambda d: (d / "completions.jsonl").unlink(),
        lambda d: (d / "metrics.jsonl").write_text(""),
        lambda d: (d / "metrics.jsonl").write_text('{"step": 1}\n'),
        lambda d: (d / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n'),
        lambda d: (d / "metrics.jsonl").write_text('{"step": 1, "reward/mean": null}\n'),
        lambda d: (d / "metrics.jsonl").write_text('{"step": 1, "reward/mean": "x", "y": [1]}\n'),
        lambda d: (d / "metrics.jsonl").write_text(
            '{"step": 1, "a": 1e308}\n{"step": 2, "a": -1e308}'
        ),
        lambda d: (d / "metrics.jsonl").write_text(
            '{"step": 1, "reward/mean": 1' + "0" * 400 + "}"
        ),
        lambda d: (d / "completions.jsonl").write_text('{"step": 1}\n{"step": 2, "reward": "x"}\n'),
        lambda d: (d / "completions.jsonl").write_bytes(b'\xff\xfe\n{"step": 1, "comp'),
    ],
)
def test_run_in_progress_or_with_missing_pieces(tmp_path, harm):
    run_dir = make_run(tmp_path)
    harm(run_dir)
    page, _ = report(run_dir)
    assert page.count("main") == 1
    for chart in page.charts:
        for one in chart["series"]:
            assert all(math.isfinite(value) for _, value in one["points"])
    assert not re.search(r"\b(nan|inf)\b", json.dumps(page.charts) + page.text)


def test_torn_last_line_and_unfinished_run(tmp_path):
    run_dir = make_run(tmp_path, steps=5)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "reward/me')
    page, _ = report(run_dir)
    assert "step 5 of 8" in page.text
    assert page.series["reward"][-1][0] == 5


def test_command(tmp_path):
    def run(path: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "polymath_fast.report", str(path)]
        return subprocess.run(command, capture_output=True, text=True)

    good = run(make_run(tmp_path / "run"))
    assert (good.returncode, good.stdout.strip()) == (0, str(tmp_path / "run" / "report.html"))
    bad = run(tmp_path / "nowhere")
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr.startswith("error: ") and "metrics.jsonl" in bad.stderr
    assert bad.stderr.count("\n") == 1


def test_no_run_folder_and_unwritable(tmp_path):
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        write_report(tmp_path)
    run_dir = make_run(tmp_path / "run")
    (run_dir / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html cannot be written"):
        write_report(run_dir)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 0.013, [0, 0.005, 0.01]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (40, 75, [40, 50, 60, 70]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_labels_are_short():
    values = (0, 0.5, 1 / 3, 0.00012, 12345.6, 1234.4, 1e-30, -0.25)
    assert [charts.label(value) for value in values] == [
        *("0", "0.5", "0.333", "1.2e-4", "1.2e4", "1,234", "1e-30", "-0.25"),
    ]


def test_spread_keeps_first_and_last():
    assert spread(list(range(10)), 20) == list(range(10))
    chosen = spread(list(range(1000)), 40)
    assert len(chosen) == 40 and chosen[0] == 0 and chosen[-1] == 999
