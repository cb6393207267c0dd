"""Trackers get every row, and none that fails or is slow stops a run."""

from __future__ import annotations

import dataclasses
import math
import sys
import time

import pytest
from monitored import METRICS, Settings, lines, monitor

from polymath_fast.errors import UserError
from polymath_fast.monitor import trackers


@pytest.fixture
def fake_tracker(tmp_path, monkeypatch):
    """Installs a stand-in package `wandb` with the given source."""

    def install(source: str) -> None:
        folder = tmp_path / "packages" / "wandb"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(str(folder.parent))
        monkeypatch.delitem(sys.modules, "wandb", raising=False)

    yield install
    sys.modules.pop("wandb", None)


_WORKING = """
import json, os
logged = []
class Settings:
    def __init__(self, **options): pass
def setup(settings): pass
class Run:
    url = "https://example.org/run"
    def log(self, metrics, step): logged.append((step, metrics))
    def finish(self): logged.append("finished")
arguments = {}
def init(**options):
    arguments.update(options)
    return Run()
"""


def test_tracker_gets_every_row_the_settings_and_nothing_else(tmp_path, fake_tracker, monkeypatch):
    fake_tracker(_WORKING)
    monkeypatch.setenv("WANDB_API_KEY", "hunter2hunter2")
    subject, output = monitor(tmp_path, trackers=("wandb",))
    subject.log_step(1, METRICS)
    subject.log_step(2, {"reward/mean": math.nan, "x": 1.0})
    subject.close()
    import wandb

    assert wandb.logged == [(1, METRICS), (2, {"x": 1.0, "monitor/non_finite": 1.0}), "finished"]
    assert wandb.arguments["config"] == dataclasses.asdict(Settings())
    assert "hunter2" not in repr(wandb.arguments)
    assert "https://example.org/run" in output.getvalue()
    again, _ = monitor(tmp_path, trackers=("wandb",), start_step=1)
    first_id = wandb.arguments["id"]
    again.close()
    assert wandb.arguments["id"] == first_id


@pytest.mark.parametrize(
    "source",
    [
        "raise RuntimeError('bad key hunter2hunter2 at https://me:pw@host/x')",
        "import sys\nsys.exit('bad key hunter2hunter2')",
        _WORKING.replace("logged.append((step, metrics))", "raise OSError('hunter2hunter2')"),
        _WORKING.replace('logged.append("finished")', "raise OSError('hunter2hunter2')"),
    ],
    ids=["import", "exit", "log", "finish"],
)
def test_failing_tracker_warns_once_without_secrets(tmp_path, fake_tracker, monkeypatch, source):
    fake_tracker(source)
    monkeypatch.setenv("WANDB_API_KEY", "hunter2hunter2")
    subject, output = monitor(tmp_path, trackers=("wandb",))
    for step in range(1, 6):
        subject.log_step(step, METRICS)
    subject.close()
    assert output.getvalue().count("warning: wandb failed") == 1
    assert "***" in output.getvalue()
    assert "hunter2" not in output.getvalue() and "me:pw" not in output.getvalue()
    assert len(lines(tmp_path / "metrics.jsonl")) == 5


def test_slow_tracker_is_never_waited_for(tmp_path, fake_tracker, monkeypatch):
    fake_tracker(_WORKING.replace("logged.append((step, metrics))", "__import__('time').sleep(60)"))
    monkeypatch.setattr(trackers, "CLOSE_TIMEOUT", 0.2)
    monkeypatch.setattr(trackers, "QUEUE_SIZE", 3)
    subject, output = monitor(tmp_path, trackers=("wandb",), total=50)
    started = time.monotonic()
    for step in range(1, 51):
        subject.log_step(step, METRICS)
    subject.close()
    assert time.monotonic() - started < 5
    assert output.getvalue().count("warning: wandb is too slow") == 1
    assert len(lines(tmp_path / "metrics.jsonl")) == 50


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, name):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"pip install 'polymath-fast\[{name}\]'"):
        monitor(tmp_path, trackers=(name,))


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboard")
    subject, output = monitor(tmp_path, trackers=("tensorboard",))
    subject.log_step(1, METRICS)
    subject.close()
    assert list((tmp_path / "tensorboard").glob("events.*")), output.getvalue()
