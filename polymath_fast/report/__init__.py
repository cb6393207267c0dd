"""A run folder as one HTML page that needs no network: curves, completions, sample, settings.

    python -m polymath_fast.report RUN_DIR

Works while the run goes on, and on runs whose files lack columns or end in a torn line.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from polymath_fast.errors import UserError
from polymath_fast.folders import lookup, run_data

NAME = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from the folder's files, replacing an earlier one whole.

    Raises UserError when `run_dir` is no run's folder or cannot be written.
    """
    from polymath_fast.report.completions import choose
    from polymath_fast.report.page import render

    lookup.require("run folder", str(run_dir))
    run_dir = Path(run_dir)
    if not (run_dir / run_data.METRICS).is_file():
        raise UserError(
            f"{run_dir} holds no {run_data.METRICS}; pass the output folder of a run, for example "
            "runs/first"
        )
    rows = run_data.metrics(run_dir)
    page = render(run_dir, _config(run_dir), rows, choose(run_dir, rows))
    target = run_dir / NAME
    temporary = target.with_name(f"{NAME}.tmp")
    try:
        # Lone surrogates of cut tokens have no UTF-8 form; they show as question marks.
        temporary.write_text(page, encoding="utf-8", errors="replace")
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror})") from error
    return target


def _config(run_dir: Path) -> dict[str, Any]:
    """The resolved settings, nested tables flattened; empty when the file is not there or torn."""
    try:
        settings = tomllib.loads((run_dir / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    return flat
