"""Persistent worker processes that the parent times with its own clock and kills.

Threads and signals cannot stop a hang in C code, and pools that stop waiting without killing fill
up with hung workers. Here a task that exceeds its time costs its worker's life.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from polymath_fast.rewards.process import WorkerProcess, wait_for_any

ATTEMPTS = 2


@dataclass(frozen=True)
class Outcome:
    """How one request ended."""

    status: Literal["ok", "timeout", "died"]
    """"died": the worker ended by itself on every attempt, or could not start"""
    value: Any = None
    """the reply when ok"""
    detail: str = ""
    """why it died, with the last lines that the worker printed"""


@dataclass
class _Task:
    index: int
    request: object
    attempts: int = 0


class WorkerPool:
    """Up to `size` processes that serve `service` (a module with `start(options) -> (handle,
    greeting)`). Started on first use, restarted after a death; callable from any thread."""

    def __init__(
        self,
        service: str,
        options: Mapping[str, Any] | None = None,
        *,
        size: int = 1,
        limits: Mapping[str, int] | None = None,
        startup_timeout: float = 60.0,
    ) -> None:
        self._setup = {"service": service, "options": dict(options or {}), "limits": limits or {}}
        self._size = size
        self._startup_timeout = startup_timeout
        self._workers: list[WorkerProcess] = []
        self._lock = threading.Lock()
        self._closing = False
        self._finalizer = weakref.finalize(self, _kill_all, self._workers)

    def run(
        self,
        requests: Sequence[object],
        timeout: float,
        *,
        budget: float = float("inf"),
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Outcome]:
        """Answers `requests` in order of their position.

        Args:
            requests: JSON values. Duplicates are the caller's business.
            timeout: seconds per request, from its hand-over to a worker that is ready.
            budget: seconds for all; requests not begun or not done by then end as "timeout".
            stop: once it returns True, no other request is begun; those end as "timeout".
        """
        with self._lock:
            return _Round(self, requests, timeout, budget, stop).play()

    def greet(self) -> Outcome:
        """Starts a worker if none is alive; its greeting, or why it died."""
        with self._lock:
            self._reap()
            worker = self._workers[0] if self._workers else self._start()
            while not worker.ready and not worker.ended:
                wait_for_any([worker], 0.1)
                if time.monotonic() > worker.deadline:
                    worker.kill("it did not start in time")
            if worker.ready:
                return Outcome("ok", worker.greeting)
            return Outcome("died", detail=worker.obituary())

    def close(self) -> None:
        """Kills every worker, also those of a `run` in another thread, which then ends. A later
        `run` starts new ones."""
        self._closing = True
        with self._lock:
            self._closing = False
            _kill_all(self._workers)

    def pids(self) -> list[int]:
        """Process ids of the live workers."""
        return [worker.pid for worker in self._workers if not worker.ended]

    def _start(self) -> WorkerProcess:
        worker = WorkerProcess(self._setup, time.monotonic() + self._startup_timeout)
        self._workers.append(worker)
        return worker

    def _reap(self) -> None:
        for worker in [worker for worker in self._workers if worker.ended]:
            worker.kill()
            self._workers.remove(worker)


class _Round:
    """One call of WorkerPool.run: an event loop over its workers."""

    def __init__(
        self,
        pool: WorkerPool,
        requests: Sequence[object],
        timeout: float,
        budget: float,
        stop: Callable[[], bool],
    ) -> None:
        self.pool, self.timeout, self.stop = pool, timeout, stop
        self.end = time.monotonic() + budget
        self.queue = deque(_Task(index, request) for index, request in enumerate(requests))
        self.outcomes: list[Outcome | None] = [None] * len(requests)
        self.running: dict[WorkerProcess, _Task] = {}
        self.failed_starts = 0
        self.last_words = ""

    def play(self) -> list[Outcome]:
        try:
            while self.queue or self.running:
                self._hand_out()
                wait_for_any(self.pool._workers, self._patience())
                for worker in list(self.pool._workers):
                    self._attend(worker)
                if time.monotonic() > self.end or self.pool._closing:
                    self._give_up(Outcome("timeout"))
                elif self.stop():
                    self._skip_queue(Outcome("timeout"))
                elif self.failed_starts >= ATTEMPTS:
                    self._give_up(Outcome("died", detail=self.last_words))
        finally:
            # reached with tasks running only by an exception, Ctrl-C for one
            for worker in self.running:
                worker.kill()
            self.pool._reap()
        return [outcome or Outcome("died") for outcome in self.outcomes]

    def _hand_out(self) -> None:
        workers = self.pool._workers
        # a second worker costs half a second of a core: only a queue is worth it
        wanted = min(self.pool._size, 1 + len(self.queue) // 16) if self.queue else 0
        while len(workers) < wanted:
            self.pool._start()
        for worker in workers:
            if worker.ready and not worker.ended and worker not in self.running and self.queue:
                task = self.queue.popleft()
                task.attempts += 1
                self.running[worker] = task
                worker.send(task.request, time.monotonic() + self.timeout)

    def _patience(self) -> float:
        deadlines = [worker.deadline for worker in self.pool._workers if worker.busy]
        remaining = min([*deadlines, self.end]) - time.monotonic()
        # a process forked by a dead worker may hold its pipe open, so look from time to time
        return max(0.0, min(remaining, 0.1))

    def _attend(self, worker: WorkerProcess) -> None:
        task = self.running.get(worker)
        if worker.replied:
            reply = worker.take_reply()
            if task is not None:
                del self.running[worker]
                self.outcomes[task.index] = Outcome("ok", reply)
        elif worker.ended:
            self._bury(worker, task)
        elif worker.busy and time.monotonic() > worker.deadline:
            worker.kill("it did not start in time" if task is None else "")
            if task is not None:
                del self.running[worker]
                self.outcomes[task.index] = Outcome("timeout")
                self.pool._reap()
            else:
                self._bury(worker, None)

    def _bury(self, worker: WorkerProcess, task: _Task | None) -> None:
        self.last_words = worker.obituary()
        self.pool._reap()
        if task is None:
            self.failed_starts += not worker.ready
            return
        del self.running[worker]
        if task.attempts < ATTEMPTS:
            self.queue.append(task)
        else:
            self.outcomes[task.index] = Outcome("died", detail=self.last_words)

    def _give_up(self, outcome: Outcome) -> None:
        for worker, task in self.running.items():
            worker.kill()
            self.outcomes[task.index] = outcome
        self.running.clear()
        self._skip_queue(outcome)
        self.pool._reap()

    def _skip_queue(self, outcome: Outcome) -> None:
        for task in self.queue:
            self.outcomes[task.index] = outcome
        self.queue.clear()


def _kill_all(workers: list[WorkerProcess]) -> None:
    while workers:
        workers.pop().kill()
