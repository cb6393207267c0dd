"""`python -m polymath_fast.report RUN_DIR`: writes the page and prints where it is."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, where Ctrl-C would be a traceback
    from polymath_fast import start

    start.run("polymath_fast.report.__main__")

import argparse
from pathlib import Path

from polymath_fast.errors import UserError
from polymath_fast.monitor.console import print_error
from polymath_fast.report import write_report


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(prog="python -m polymath_fast.report", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="output folder of a run, also one in progress")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.run_dir))
    except UserError as error:
        print_error(error)
        return 2
    return 0
