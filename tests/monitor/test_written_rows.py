"""Rows of metrics and completions on disk, also after a resume and when the disk fails."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from monitored import HOSTILE, METRICS, completion, lines, monitor

from polymath_fast.errors import UserError
from polymath_fast.folders import run_data


def test_one_object_a_line_on_disk_as_soon_as_the_step_is_logged(tmp_path):
    subject, _ = monitor(tmp_path)
    subject.log_step(1, METRICS)
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, **METRICS}]
    rows = [completion(1, 0, 1.0, HOSTILE), completion(1, 1, None)]
    subject.log_completions(1, rows)
    assert lines(tmp_path / "completions.jsonl") == rows
    subject.close()


def test_tensors_and_numpy_scalars_are_numbers(tmp_path):
    import numpy as np
    import torch

    subject, _ = monitor(tmp_path)
    subject.log_step(1, {"a": torch.tensor(0.5), "b": np.float32(0.25), "c": 3, "d": True})
    subject.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 0.5, "b": 0.25, "c": 3, "d": 1}]


def test_non_finite_values_become_null_and_are_counted(tmp_path):
    subject, output = monitor(tmp_path)
    subject.log_step(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    subject.log_step(2, {"a": -math.inf})
    subject.log_completions(2, [completion(2, 0, math.nan)])
    subject.close()
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "a": None, "b": None, "c": 1.0, "monitor/non_finite": 2},
        {"step": 2, "a": None, "monitor/non_finite": 1},
    ]
    assert lines(tmp_path / "completions.jsonl")[0]["reward"] is None
    assert subject.non_finite == 3
    assert output.getvalue().count("not finite at step") == 1


def test_resume_cuts_both_files_after_the_step_and_drops_torn_lines(tmp_path):
    first, _ = monitor(tmp_path)
    for step in (0, 1, 2, 3):
        first.log_step(step, {"reward/mean": step / 4})
        first.log_completions(step, [completion(step, index, 0.0) for index in range(3)])
    first.close()
    for name in ("metrics.jsonl", "completions.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 2, "to')
    second, output = monitor(tmp_path, start_step=2)
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert [row["step"] for row in lines(tmp_path / "completions.jsonl")] == [0] * 3 + [1] * 3 + [
        2
    ] * 3
    assert "metrics.jsonl: 2 rows past step 2 cut" in output.getvalue()
    second.log_step(3, {"reward/mean": 0.9})
    second.close()
    assert lines(tmp_path / "metrics.jsonl")[-1] == {"step": 3, "reward/mean": 0.9}
    assert not list(tmp_path.glob("*.tmp"))


def test_rows_that_a_failing_disk_took_are_named_and_not_promised(tmp_path):
    first, _ = monitor(tmp_path)
    for step in (1, 2, 3):
        first.log_step(step, {"reward/mean": step / 4})
        first.log_completions(step, [completion(step, index, 0.0) for index in range(3)])
    first.sync()
    first.close()
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    completions = tmp_path / "completions.jsonl"
    rows = completions.read_bytes().splitlines(keepends=True)
    rows[1] = b"\0" * 50 + b"\n"
    completions.write_bytes(b"".join(rows))
    second, output = monitor(tmp_path, start_step=3)
    second.close()
    said = output.getvalue()
    assert "metrics.jsonl: torn rows: 1, steps without rows: 3; nothing brings them back" in said
    assert "completions.jsonl: torn rows: 1; nothing" in said and "redone" not in said
    assert [row["step"] for row in lines(metrics)] == [1, 2]
    assert len(lines(completions)) == 8


def test_resume_without_a_checkpoint_starts_the_files_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    subject, _ = monitor(tmp_path)
    subject.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_full_disk_is_a_clear_error(tmp_path):
    subject, _ = monitor(tmp_path)
    with open("/dev/full", "w") as full:
        subject._files["metrics.jsonl"] = full
        with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written \(No space left"):
            subject.log_step(1, METRICS)
        with pytest.raises(OSError, match="No space"):
            full.close()


def test_metrics_reader_merges_steps_and_skips_what_is_no_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 2, "a": 1}\n[1]\nnull\n\xff\xfe\n{"step": "3"}\n{"step": true}\n{"a": 1}\n'
        b'{"step": 1, "a": 5, "b": null}\n{"step": 2, "a": 3, "c": 4}\n{"step": 3, "a"'
    )
    rows = run_data.metrics(tmp_path)
    assert rows == [{"step": 1, "a": 5, "b": None}, {"step": 2, "a": 3, "c": 4}]
    assert run_data.series(rows, "a") == [(1, 5.0), (2, 3.0)]
    assert run_data.series(rows, "b") == []


def test_every_metric_key_is_documented():
    root = Path(__file__).parents[2]
    groups = "reward|completion|policy|sampling|time|throughput|memory|update|monitor|speculation"
    keys = set()
    for path in (root / "polymath_fast").rglob("*.py"):
        keys |= set(re.findall(rf'"((?:{groups})/\w+)"', path.read_text(encoding="utf-8")))
    documented = (root / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert {"reward/mean", "monitor/non_finite", "sampling/logprob_diff_max"} <= keys
    assert [key for key in sorted(keys) if f"`{key}`" not in documented] == []


def test_peak_memory_sees_what_was_touched():
    code = (
        "from polymath_fast.monitor import peak_memory_gib as peak\n"
        "before = peak(); block = bytearray(b'x' * (100 << 20)); held = peak(); del block\n"
        "print(before, held, peak())"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    before, held, after = map(float, output.split())
    assert 0.005 < before < 0.5
    assert 0.09 < held - before < 0.3
    assert after >= held
