"""Two runs that want the same folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from polymath_fast.errors import UserError
from polymath_fast.folders import run_folder
from polymath_fast.folders.run_folder import LOCK_FILE, RunLock


def test_second_run_in_the_same_folder(tmp_path):
    in_use = rf"in use by another run \(pid {os.getpid()} on"
    with RunLock(tmp_path), pytest.raises(UserError, match=in_use):
        RunLock(tmp_path).acquire()
    with RunLock(tmp_path):
        pass


_HOLDER = """
import sys, time
from pathlib import Path
from polymath_fast.folders.run_folder import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_lock_dies_with_a_killed_run(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"pid {holder.pid} on .*{tmp_path}-2"):
            RunLock(tmp_path).acquire()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_forked_worker_does_not_keep_the_folder_locked(tmp_path):
    lock = RunLock(tmp_path).acquire()
    ready, stop = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready[1], b"x")
        os.read(stop[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        lock.release()
        with RunLock(tmp_path):
            pass
    finally:
        os.write(stop[1], b"x")
        os.waitpid(child, 0)
        for descriptor in (*ready, *stop):
            os.close(descriptor)


def test_lock_file_with_garbage_still_locks(tmp_path):
    with RunLock(tmp_path):
        (tmp_path / LOCK_FILE).write_bytes(b"\xff\x00 not json")
        with pytest.raises(UserError, match="pid unknown"):
            RunLock(tmp_path).acquire()


def test_filesystem_without_locks_is_said_aloud(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_folder.fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="no locks"), RunLock(tmp_path):
        pass
