"""A monitor for a process whose run another one records and shows."""

from __future__ import annotations

from typing import Any


class Quiet:
    """Takes what `Monitor` takes of a training loop, and forgets it."""

    def note(self, text: str) -> None:
        """Nothing is shown."""

    def note_once(self, where: str, text: str) -> None:
        """Nothing is shown."""

    def phase(self, name: str) -> None:
        """Nothing is shown."""

    def log_step(self, step: int, metrics: Any) -> None:
        """Nothing is written."""

    def log_completions(self, step: int, rows: Any) -> None:
        """Nothing is written."""
