"""Worker processes: timed and killed by the parent, never orphaned, never in its way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from polymath_fast.rewards.pool import WorkerPool

SERVICE = """
    import os, re, sys, time

    def start(options):
        if options.get("die"):
            print("no such luck", file=sys.stderr)
            os._exit(3)
        if options.get("slow_start"):
            time.sleep(60)
        return handle, sorted(sys.modules)

    def handle(request):
        command, value = request
        if command == "echo":
            return value
        if command == "pid":
            return os.getpid()
        if command == "sleep":
            time.sleep(value)
        if command == "hold_the_lock":
            re.match("(a+)+$", "a" * 60 + "b")
        if command == "die":
            os._exit(7)
        if command == "die_once":
            with open(value, "a") as marker:
                marker.write("x")
            if os.path.getsize(value) == 1:
                os._exit(7)
        if command == "shout":
            for stream in (sys.stdout, sys.stderr):
                stream.write("noise " * value)
                stream.flush()
            os.write(1, b'{"forged": "reply"}')
        if command == "allocate":
            try:
                return len(bytearray(value))
            except MemoryError:
                return "refused"
        if command == "fork_a_holder":
            if os.fork() == 0:
                time.sleep(30)
                os._exit(0)
            os._exit(0)
        if command == "read":
            return sys.stdin.read()
        return "done"
"""


@pytest.fixture(scope="module", autouse=True)
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    (folder / "odd_service.py").write_text(textwrap.dedent(SERVICE))
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture
def pool():
    pool = WorkerPool("odd_service", size=2)
    yield pool
    pool.close()


def statuses(outcomes) -> list[str]:
    return [outcome.status for outcome in outcomes]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_alive(pid)


def test_replies_come_back_in_order(pool):
    big = "x" * 3_000_000
    values = [*range(100), None, "\ud800\0\n\u2028", {"a": [1.5]}, big]
    outcomes = pool.run([["echo", value] for value in values], timeout=10)
    assert [outcome.value for outcome in outcomes] == values
    assert 1 <= len(pool.pids()) <= 2


def test_nothing_runs_before_the_first_request(pool):
    assert pool.pids() == []
    assert pool.run([], timeout=1) == []
    assert pool.pids() == []


def test_a_worker_starts_light_and_quickly(pool):
    begun = time.monotonic()
    greeting = pool.greet()
    seconds = time.monotonic() - begun
    assert greeting.status == "ok"
    assert not {"torch", "vllm", "numpy", "transformers"} & set(greeting.value)
    assert seconds < 5


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


def test_noise_is_neither_reply_nor_obstacle(pool, capfd):
    assert pool.run([["shout", 100_000]], timeout=10)[0].value == "done"
    assert pool.run([["echo", 1]], timeout=5)[0].value == 1
    assert capfd.readouterr() == ("", "")


def test_standard_input_of_the_served_code_is_empty(pool):
    assert pool.run([["read", None]], timeout=5)[0].value == ""


def test_a_fork_that_holds_the_pipes_does_not_hide_the_death(pool):
    begun = time.monotonic()
    assert statuses(pool.run([["fork_a_holder", None]], timeout=20)) == ["died"]
    assert time.monotonic() - begun < 15


def test_the_batch_as_a_whole_has_a_budget():
    pool = WorkerPool("odd_service", size=1)
    pool.greet()
    begun = time.monotonic()
    outcomes = pool.run([["echo", 1]] + [["sleep", 9]] * 50, timeout=30, budget=0.5)
    assert statuses(outcomes) == ["ok"] + ["timeout"] * 50
    assert time.monotonic() - begun < 10
    pool.close()


def test_a_run_that_is_stopped_begins_nothing_else():
    pool = WorkerPool("odd_service", size=1)
    pool.greet()
    outcomes = pool.run([["sleep", 0.5], ["echo", 1]], timeout=30, stop=lambda: True)
    assert statuses(outcomes) == ["ok", "timeout"]
    assert pool.run([["echo", 1]], timeout=5)[0].value == 1
    pool.close()


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


def test_memory_limit():
    pool = WorkerPool("odd_service", limits={"RLIMIT_AS": 400 * 2**20})
    outcomes = pool.run([["allocate", 2**30], ["allocate", 2**20]], timeout=5)
    assert [outcome.value for outcome in outcomes] == ["refused", 2**20]
    pool.close()


def test_a_service_that_cannot_start_is_reported():
    pool = WorkerPool("odd_service", {"die": True})
    assert pool.greet().detail == "exit code 3: no such luck"
    outcomes = pool.run([["echo", 1], ["echo", 2]], timeout=5)
    assert statuses(outcomes) == ["died", "died"]
    assert outcomes[0].detail == "exit code 3: no such luck"
    missing = WorkerPool("no_service_of_that_name").run([1], timeout=5)[0]
    assert "No module named 'no_service_of_that_name'" in missing.detail


def test_a_service_that_hangs_at_its_start_is_reported():
    pool = WorkerPool("odd_service", {"slow_start": True}, startup_timeout=0.3)
    assert pool.greet() == pool.run([["echo", 1]], timeout=5)[0]
    assert pool.greet().detail == "it did not start in time"
    assert pool.pids() == []


def test_threads_share_a_pool(pool):
    results = {}

    def work(k: int) -> None:
        results[k] = [o.value for o in pool.run([["echo", [k, j]] for j in range(20)], timeout=5)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: [[k, j] for j in range(20)] for k in range(4)}


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
