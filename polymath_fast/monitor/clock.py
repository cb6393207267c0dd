"""How long the phases of a step take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polymath_fast.monitor import Monitor


class Clock:
    """Seconds of the phases of one step, shown on the live line while they run."""

    def __init__(self, monitor: Monitor):
        self._monitor = monitor
        self._started = time.perf_counter()
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the block as `phase`, also when it fails; blocks of one phase add up."""
        self._monitor.phase(phase)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - started)

    def add(self, phase: str, seconds: float) -> None:
        """More seconds of `phase`, which may have run beside another one."""
        key = f"time/{phase}"
        self._phases[key] = self._phases.get(key, 0.0) + seconds

    def metrics(self) -> dict[str, float]:
        """time/<phase> for each phase and time/step for all since the clock was made."""
        return {"time/step": time.perf_counter() - self._started, **self._phases}
