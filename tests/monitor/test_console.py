"""What a user sees while a run goes on and at its end, on terminals of every kind."""

from __future__ import annotations

import io
import re

import pytest
from monitored import HOSTILE, METRICS, completion, monitor
from rich.console import Console

from polymath_fast import evaluate, train
from polymath_fast.monitor import console as view
from polymath_fast.monitor import pick, status
from polymath_fast.report import __main__ as report


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


def test_a_terminal_of_no_width_is_one_of_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    assert view.make_console().width == 80
    monkeypatch.setenv("COLUMNS", "33")
    assert view.make_console().width == 33
