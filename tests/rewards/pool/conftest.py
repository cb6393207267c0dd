"""A service that does odd things when it is asked to, and a pool of its workers."""

from __future__ import annotations

import sys
import textwrap

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
