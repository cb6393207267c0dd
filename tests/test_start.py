"""How `python -m` begins and ends: before and after everything that it is for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

BEGIN = "import sys; from polymath_fast import start; start.run(sys.argv[1])"


@pytest.fixture
def command(tmp_path: Path):
    """Starts a module with this text as `python -m` would."""

    def begin(text: str, **options) -> subprocess.Popen:
        (tmp_path / "command.py").write_text(textwrap.dedent(text))
        environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
        environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        return subprocess.Popen(
            [sys.executable, "-c", BEGIN, "command"],
            text=True,
            env=environment,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,
        )

    return begin


def test_threads_are_told_to_spin_briefly_before_torch_is_there(command) -> None:
    """OpenMP reads it once. Beside another busy process long spins cost whole time slices."""
    child = command(
        """
        import os, sys
        early = "torch" not in sys.modules and "GOMP_SPINCOUNT" in os.environ
        def main():
            print(early)
            return 3
        """
    )
    out, err = child.communicate(timeout=60)
    assert (out, child.returncode) == ("True\n", 3), err


def test_an_interrupt_inside_of_an_import_is_one_line(command) -> None:
    """Whatever that import makes of a KeyboardInterrupt."""
    child = command(
        """
        import sys, time
        print("importing", flush=True)
        try:
            time.sleep(60)
        except BaseException as error:
            raise RuntimeError("half an import") from error
        """
    )
    assert child.stdout.readline() == "importing\n"
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (out, err, child.returncode) == ("", "stopped\n", 130)


def test_main_gets_interrupts_as_ever(command) -> None:
    child = command(
        """
        import time
        def main():
            try:
                print("at work", flush=True)
                time.sleep(60)
            except KeyboardInterrupt:
                print("saved", flush=True)
                raise
        """
    )
    assert child.stdout.readline() == "at work\n"
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (out, err, child.returncode) == ("saved\n", "stopped\n", 130)


@pytest.mark.parametrize(
    "text",
    ["print('x' * 100_000)", "print('x')", "print('x'); raise SystemExit(0)"],
    ids=["much", "little", "help"],
)
def test_a_reader_that_has_gone_away_is_no_error(command, text) -> None:
    read, write = os.pipe()
    os.close(read)
    child = command(f"def main():\n    {text}\n    return 0\n", stdout=write)
    os.close(write)
    _, err = child.communicate(timeout=60)
    assert (err, child.returncode) == ("", 141)


def test_there_may_be_no_output_at_all(command) -> None:
    child = command(
        """
        import sys
        def main():
            assert sys.stdout is None
            return 3
        """,
        preexec_fn=lambda: os.close(1),
        stdout=None,
    )
    _, err = child.communicate(timeout=60)
    assert (err, child.returncode) == ("", 3)
