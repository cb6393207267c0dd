"""Importing the integrations loads nothing; a missing or unknown trainer is named."""

from __future__ import annotations

import subprocess
import sys

import pytest

from polymath_fast import integrations


def test_import_loads_no_trainer() -> None:
    code = (
        "import sys, polymath_fast.integrations;"
        "print([m for m in ('torch', 'trl', 'verl', 'openrlhf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_package_names_the_command_and_the_version() -> None:
    with pytest.raises(ImportError) as missing:
        integrations.require("no-such-trainer", "1.2.3", ("1.2.",), "pip install no-such-trainer")
    assert str(missing.value) == (
        "no-such-trainer is not installed; tested with no-such-trainer 1.2.3: "
        "pip install no-such-trainer"
    )


def test_version_that_nobody_looked_at_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrations, "version", lambda package: "2.0.0")
    with pytest.raises(ImportError, match=r"trl 2.0.0 is installed, .* knows 1.16.x"):
        integrations.require("trl", "1.16.0", ("1.16.",), "pip install trl==1.16.0")
