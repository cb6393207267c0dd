"""Worker processes: replies in order, light starts, time and memory that end."""

from __future__ import annotations

import threading
import time

from states import statuses

from polymath_fast.rewards.pool import WorkerPool


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


def test_noise_is_neither_reply_nor_obstacle(pool, capfd):
    assert pool.run([["shout", 100_000]], timeout=10)[0].value == "done"
    assert pool.run([["echo", 1]], timeout=5)[0].value == 1
    assert capfd.readouterr() == ("", "")


def test_standard_input_of_the_served_code_is_empty(pool):
    assert pool.run([["read", None]], timeout=5)[0].value == ""


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
