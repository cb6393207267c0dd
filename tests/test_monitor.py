"""What a run writes down, and a console and trackers that never stop it."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from polymath_fast import evaluate, train
from polymath_fast.errors import UserError
from polymath_fast.folders import run_data
from polymath_fast.monitor import Monitor, pick, status, trackers
from polymath_fast.monitor import console as view
from polymath_fast.report import __main__ as report


@dataclasses.dataclass
class Settings:
    log_completions_every: int = 5
    learning_rate: float = 5e-5


METRICS = {
    "reward/mean": 0.25,
    "completion/mean_length": 62.0,
    "throughput/completion_tokens_per_s": 480.0,
    "memory/peak_gib": 1.875,
    "time/step": 12.0,
}
HOSTILE = (
    "ok\x1b[2J\x1b]0;title\x07 \r gone [bold]not markup[/] [/] \u202eabc \ud800 \x9b31m\n\\boxed{5}"
)


def completion(step: int, index: int, reward: float | None, text: str = "four") -> dict:
    return {
        **{"step": step, "group": 0, "index": index, "prompt": "2+2?", "completion": text},
        **{"reward": reward, "rewards": {"math": reward}, "length": 3, "finish_reason": "stop"},
        "weight_version": step - 1,
    }


def monitor(run_dir: Path, total: int = 10, **options) -> tuple[Monitor, io.StringIO]:
    output = io.StringIO()
    options.setdefault("console", Console(file=output, width=80, highlight=False))
    return Monitor(run_dir, Settings(), total, **options), output


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def test_plain_lines_when_the_output_is_no_terminal(tmp_path):
    subject, output = monitor(tmp_path)
    subject.phase("generate")
    for step in (1, 2):
        subject.log_step(step, METRICS)
    subject.close()
    first, second = output.getvalue().splitlines()
    fields = "reward 0.250  length 62  tok/s 480  memory 1.88 GiB  ETA "
    assert first == "step 1/10  " + fields + "1:48"
    assert second == "step 2/10  " + fields + "0:48"
    assert "\x1b" not in output.getvalue()


def test_dumb_terminal_gets_plain_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    output = io.StringIO()
    subject, _ = monitor(tmp_path, console=Console(file=output, force_terminal=True, width=80))
    subject.log_step(1, METRICS)
    subject.close()
    assert output.getvalue().count("\n") == 1
    assert "\r" not in output.getvalue() and "\x1b[2K" not in output.getvalue()


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_status_fits_the_terminal_and_keeps_step_and_reward(width):
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, color_system=None)
    subject = status.Status(console, 0, 10)
    for step in range(1, 4):
        subject.phase("generate")
        subject.show({"step": step, **METRICS})
    subject.stop()
    drawn = re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", output.getvalue())
    assert max(len(line.rstrip()) for line in drawn) <= width
    assert any("step 3/10" in line and (width < 25 or "reward 0.250" in line) for line in drawn)
    assert any("memory" in line for line in drawn) == (width >= 80)


def test_live_line_is_removed_and_the_cursor_given_back(tmp_path):
    output = io.StringIO()
    subject, _ = monitor(tmp_path, console=Console(file=output, force_terminal=True, width=80))
    subject.log_step(1, METRICS)
    assert "\x1b[?25l" in output.getvalue()
    subject.close()
    assert output.getvalue().rfind("\x1b[?25h") > output.getvalue().rfind("\x1b[?25l")
    assert output.getvalue().endswith("\x1b[2K")


def test_duration():
    assert [status.duration(s) for s in (0, 59.6, 90, 3700, -5)] == [
        *("0:00", "1:00", "1:30", "1:01:40", "0:00"),
    ]


def test_completions_are_shown_every_few_steps(tmp_path):
    subject, output = monitor(tmp_path)
    for step in range(1, 11):
        subject.log_completions(step, [completion(step, 0, 1.0), completion(step, 1, 0.0)])
    subject.close()
    assert re.findall(r"completions of step (\d+)", output.getvalue()) == ["1", "5", "10"]


def test_hostile_text_reaches_the_terminal_as_text(tmp_path):
    subject, output = monitor(tmp_path)
    subject.plan({"model [bold]": HOSTILE})
    subject.note(HOSTILE)
    subject.log_completions(5, [completion(5, 0, 1.0, HOSTILE), completion(5, 1, 0.0, "")])
    subject.close()
    shown = output.getvalue()
    assert not {"\x1b", "\x07", "\r", "\u202e", "\ud800", "\x9b"} & set(shown)
    assert shown.count("\\x1b[2J") == 3
    assert shown.count("[bold]not markup[/]") == 3
    assert "(empty)" in shown


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (train.main, ["--dry-run", "--model", f"random:{HOSTILE}"]),
        (evaluate.main, ["--model", f"random:{HOSTILE}"]),
        (report.main, [HOSTILE]),
    ],
)
def test_what_ends_a_command_is_escaped(command, words, capsys):
    """Messages of rewards hold what the model wrote; a name of a file or a model may be as bad."""
    assert command([word.replace("\ud800", "") for word in words]) == 2
    shown = capsys.readouterr().err
    assert "error: " in shown and "\\x1b[2J" in shown
    assert not {"\x1b", "\x07", "\r", "\u202e", "\x9b"} & set(shown)


def test_long_completion_shows_its_beginning_and_its_end():
    text = "begin " + "x" * 10_000 + " \\boxed{42}"
    shown = view.printable(text, 100)
    assert shown.startswith("begin ") and shown.endswith("\\boxed{42}")
    assert "[...9917 characters...]" in shown and len(shown) < 130


def test_pick_leaves_excluded_completions_out():
    rows = [completion(1, index, reward) for index, reward in enumerate([0.5, None, 1.0, 0.0])]
    assert {name: row["index"] for name, row in pick(rows, seed=1).items()} == {
        **{"best": 2, "worst": 3, "random": 0},
    }
    assert pick([completion(1, 7, None)], seed=1)["best"]["index"] == 7


def test_summary_takes_before_and_after_from_the_file_of_the_whole_run(tmp_path):
    def accuracy(correct: int) -> dict:
        return {
            "eval/rectangle/mean@1": correct / 40,
            "eval/rectangle/low": 0.02,
            "eval/rectangle/high": 0.53,
            "eval/rectangle/correct": correct,
            "eval/rectangle/completions": 40,
        }

    first, _ = monitor(tmp_path, total=4)
    first.log_step(0, accuracy(3))
    for step in (1, 2):
        first.log_step(step, {"reward/mean": 0.25})
    first.close()
    second, output = monitor(tmp_path, total=4, start_step=2)
    for step, reward in ((3, 0.9), (4, 1.0)):
        second.log_step(step, {"reward/mean": reward})
    second.log_step(4, accuracy(15))
    output.truncate(0)
    checkpoint = tmp_path / "checkpoints" / "step_000004"
    second.summary(checkpoint=checkpoint, report=tmp_path / "report.html")
    second.close()
    shown = output.getvalue()
    assert "0.250 -> 0.950 (mean of the last 2 steps)" in shown
    assert "before 7.5% (3/40, 95 % interval 2.0% to 53.0%)" in shown
    assert "after  37.5% (15/40" in shown
    assert f"polymath_fast.evaluate --model {checkpoint}" in shown
    assert "--resume" not in shown


def test_interrupted_summary_says_how_to_go_on(tmp_path):
    run_dir = tmp_path / "a run"
    run_dir.mkdir()
    subject, output = monitor(run_dir)
    subject.log_step(1, METRICS)
    subject.summary(checkpoint=None, report=None, interrupted=True)
    subject.close()
    command = f"--config '{run_dir}/config.toml' --output-dir '{run_dir}' --resume auto"
    assert command in output.getvalue()
    assert "no checkpoint was saved" in output.getvalue()


def test_metrics_reader_merges_steps_and_skips_what_is_no_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 2, "a": 1}\n[1]\nnull\n\xff\xfe\n{"step": "3"}\n{"step": true}\n{"a": 1}\n'
        b'{"step": 1, "a": 5, "b": null}\n{"step": 2, "a": 3, "c": 4}\n{"step": 3, "a"'
    )
    rows = run_data.metrics(tmp_path)
    assert rows == [{"step": 1, "a": 5, "b": None}, {"step": 2, "a": 3, "c": 4}]
    assert run_data.series(rows, "a") == [(1, 5.0), (2, 3.0)]
    assert run_data.series(rows, "b") == []


_RUN = """
import dataclasses, sys
from pathlib import Path
from polymath_fast.monitor import Monitor
@dataclasses.dataclass
class Settings: log_completions_every: int = 1
with Monitor(Path(sys.argv[1]), Settings(), 300) as monitor:
    monitor.plan({"model": "tiny"})
    for step in range(1, 301):
        monitor.phase("generate")
        monitor.log_step(step, {"reward/mean": 0.5})
        monitor.log_completions(step, [{"completion": "x" * 400, "reward": 1.0, "length": 9}])
    monitor.summary(checkpoint=None, report=None)
print("a library's own print", flush=True)
sys.exit(7)
"""


@pytest.mark.parametrize(
    "shell",
    [
        'exec "$0" -c "$1" "$2" >&-',
        '"$0" -c "$1" "$2" | head -1',
        'exec "$0" -c "$1" "$2" >/dev/full',
    ],
    ids=["closed", "broken pipe", "full"],
)
def test_run_survives_its_output(tmp_path, shell):
    script = "set -o pipefail\n" + shell
    result = subprocess.run(
        ["bash", "-c", script, sys.executable, _RUN, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (7, "")
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == list(range(1, 301))
    assert len(lines(tmp_path / "completions.jsonl")) == 300


def test_run_survives_a_terminal_that_goes_away(tmp_path):
    """The terminal hangs up in the middle of the run, while the live line is being drawn."""
    leader, follower = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(tmp_path)],
        stdout=follower,
        stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(follower)
    assert os.read(leader, 100)
    os.close(leader)
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (7, b"")
    assert len(lines(tmp_path / "metrics.jsonl")) == 300


def test_output_that_cannot_encode(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", _RUN.replace('"tiny"', '"\\u4f60"'), str(tmp_path)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (7, b"")
    assert b"step 300/300" in result.stdout


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


def test_every_metric_key_is_documented():
    root = Path(__file__).parent.parent
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


def test_a_terminal_of_no_width_is_one_of_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    assert view.make_console().width == 80
    monkeypatch.setenv("COLUMNS", "33")
    assert view.make_console().width == 33
