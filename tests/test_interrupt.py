"""Ctrl-C and friends: the first asks, the second insists."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from polymath_fast.run.interrupt import Interrupt

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_only_asks(number, capfd):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert not interrupt.requested and interrupt.exit_code == 0
        signal.raise_signal(number)
        assert interrupt.requested and interrupt.signal == number
        assert interrupt.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert "finishing this step" in capfd.readouterr().err


@pytest.mark.parametrize("second", SIGNALS)
def test_second_signal_stops_at_once_and_handlers_come_back(second):
    before = signal.getsignal(second)
    with pytest.raises(KeyboardInterrupt) as caught, Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        signal.raise_signal(second)
    assert caught.value.exit_code == 128 + second
    assert signal.getsignal(second) is before


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupt.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_leave_the_handlers_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with Interrupt() as interrupt:
            seen.append((interrupt.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


_COMMAND = """
import runpy, sys
class Interrupted:
    def find_spec(name, path, target=None):
        if name == imported:
            raise KeyboardInterrupt
module, imported = sys.argv[1:]
sys.meta_path.insert(0, Interrupted)
sys.argv[1:] = ["run"] if "report" in module else []
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("command", "imported"),
    [
        ("train", "polymath_fast.rewards"),
        ("train", "tyro"),
        ("evaluate", "polymath_fast.samples"),
        ("doctor", "importlib.metadata"),
        ("doctor", "torch"),
        ("report", "polymath_fast.monitor"),
        ("report", "polymath_fast.report.page"),
    ],
)
def test_an_interrupt_while_modules_are_imported_is_one_line(command, imported):
    module = f"polymath_fast.{command}" + (".__main__" if command == "report" else "")
    words = [sys.executable, "-c", _COMMAND, module, imported]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.stderr.startswith("stopped") and done.stderr.count("\n") == 1, done.stderr
    assert done.returncode in (130, -signal.SIGINT)  # a shell calls both 130


_RUN = """
import sys, time
from polymath_fast.run.interrupt import Interrupt
with Interrupt() as interrupt:
    for step in range(1, 1000):
        print("begin", step, flush=True)
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            sum(range(1000))
        print("end", step, flush=True)
        if interrupt.requested:
            break
sys.exit(interrupt.exit_code)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_running_process_finishes_its_step(number):
    child = subprocess.Popen(
        [sys.executable, "-c", _RUN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background would hand an ignored SIGINT down.
        preexec_fn=lambda: [signal.signal(one, signal.SIG_DFL) for one in SIGNALS],
    )
    assert child.stdout.readline() == "begin 1\n"
    child.send_signal(number)
    output, errors = child.communicate(timeout=20)
    *earlier, last = output.splitlines()
    assert last.startswith("end")
    assert sum(line.startswith("end") for line in earlier) == len(earlier) / 2 < 100
    assert child.returncode == 128 + number
    assert "finishing this step" in errors


def test_twice_ends_a_process_in_the_middle_of_its_step():
    child = subprocess.Popen(
        [sys.executable, "-c", _RUN.replace("0.3", "30")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert child.stdout.readline() == "begin 1\n"
    started = time.monotonic()
    child.send_signal(signal.SIGINT)
    assert "finishing" in child.stderr.readline() + child.stderr.readline()
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=20)
    assert time.monotonic() - started < 10
    assert output == "" and "polymath_fast.run.interrupt.Stopped" in errors
