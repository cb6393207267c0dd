"""Worker processes are killed by the parent, replaced, and never orphaned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from states import is_alive, statuses, wait_until_gone

from polymath_fast.rewards.pool import WorkerPool


def test_a_slow_request_costs_its_worker_and_nothing_else():
    pool = WorkerPool("odd_service", size=1)
    first = pool.run([["pid", None]], timeout=5)[0].value
    begun = time.monotonic()
    outcomes = pool.run([["sleep", 60], ["echo", 1], ["echo", 2]], timeout=0.5)
    assert statuses(outcomes) == ["timeout", "ok", "ok"]
    assert time.monotonic() - begun < 20
    assert not is_alive(first)
    pool.close()


def test_a_request_that_never_yields_the_interpreter_is_killed(pool):
    assert statuses(pool.run([["hold_the_lock", None]], timeout=0.5)) == ["timeout"]
    assert pool.run([["echo", 1]], timeout=5)[0].value == 1


def test_a_crash_is_tried_twice_and_then_reported(pool, tmp_path):
    outcomes = pool.run([["die", None], ["echo", 1]], timeout=5)
    assert statuses(outcomes) == ["died", "ok"]
    assert outcomes[0].detail == "exit code 7"
    assert pool.run([["die_once", str(tmp_path / "m")]], timeout=5)[0].value == "done"


def test_a_killed_worker_is_replaced(pool):
    pid = pool.run([["pid", None]], timeout=5)[0].value
    os.kill(pid, signal.SIGKILL)
    again = pool.run([["pid", None]], timeout=5)[0]
    assert again.status == "ok"
    assert again.value != pid


def test_a_fork_that_holds_the_pipes_does_not_hide_the_death(pool):
    begun = time.monotonic()
    assert statuses(pool.run([["fork_a_holder", None]], timeout=20)) == ["died"]
    assert time.monotonic() - begun < 15


def test_close_ends_the_run_of_another_thread(pool):
    pool.greet()
    outcomes = []
    thread = threading.Thread(
        target=lambda: outcomes.extend(pool.run([["sleep", 60]] * 3, timeout=60))
    )
    thread.start()
    while not pool._lock.locked():
        time.sleep(0.01)
    pool.close()
    thread.join(20)
    assert statuses(outcomes) == ["timeout"] * 3
    assert pool.pids() == []
    assert pool.run([["echo", 1]], timeout=5)[0].value == 1


def test_close_ends_the_workers_and_may_be_repeated(pool):
    pids = [outcome.value for outcome in pool.run([["pid", None]] * 40, timeout=5)]
    pool.close()
    pool.close()
    assert pool.pids() == []
    assert all(not is_alive(pid) for pid in pids)


@pytest.mark.parametrize("command", ["echo", "sleep", "hold_the_lock"])
def test_workers_die_with_a_killed_parent(command, tmp_path):
    script = f"""
        import sys
        from polymath_fast.rewards.pool import WorkerPool
        sys.path.insert(0, {sys.path[0]!r})
        pool = WorkerPool("odd_service")
        print(pool.run([["pid", None]], timeout=5)[0].value, flush=True)
        pool.run([[{command!r}, 60]], timeout=60)
        pool.run([["sleep", 60]], timeout=60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    worker = int(parent.stdout.readline())
    time.sleep(0.2)
    assert is_alive(worker)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until_gone(worker)


def test_workers_die_with_a_parent_that_just_ends(tmp_path):
    script = f"""
        import sys
        from polymath_fast.rewards.pool import WorkerPool
        sys.path.insert(0, {sys.path[0]!r})
        pool = WorkerPool("odd_service")
        print(pool.run([["pid", None]], timeout=5)[0].value)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=20
    )
    assert done.stderr == ""
    assert wait_until_gone(int(done.stdout))
