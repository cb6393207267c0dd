"""A save that fails or is killed at any moment costs no earlier checkpoint."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from saving import assert_all_whole, assert_holds, find, save, step_names

from polymath_fast import checkpoint
from polymath_fast.errors import UserError
from polymath_fast.folders import manifest


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("where", ["model", "fsync", "rename"])
def test_failing_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, code, where):
    save(tmp_path, 5, keep=1)

    def fail(*_):
        raise OSError(code, os.strerror(code))

    changes = {"model_files": fail} if where == "model" else {}
    if where == "fsync":
        monkeypatch.setattr(manifest.os, "fsync", fail)
    if where == "rename":
        monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError, match=os.strerror(code)) as caught:
        save(tmp_path, 10, keep=1, **changes)
    monkeypatch.undo()
    assert "step 10" in str(caught.value) and "intact" in str(caught.value)
    assert step_names(tmp_path) == ["step_000005"]
    assert_holds(find(tmp_path), 5)


def test_failing_second_rename_gives_the_replaced_checkpoint_its_name_back(tmp_path, monkeypatch):
    save(tmp_path, 5, keep=1)
    rename, calls = Path.rename, []

    def fail_once(self, target):
        calls.append(self.name)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(UserError, match="Input/output error"):
        save(tmp_path, 5, keep=1)
    assert_holds(find(tmp_path), 5)


def in_fork(action) -> int:
    """Run `action` in a forked child; its exit status (negative: the signal that killed it)."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = action() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_file_system_that_takes_no_more_bytes(tmp_path):
    """The kernel refuses the bytes under safetensors' own writer, not a stand-in for it."""
    save(tmp_path, 5, keep=1)

    def saver() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, 16_384))
        try:
            save(tmp_path, 10, keep=1, trainer_tensors={"master": torch.ones(20_000)})
        except UserError as error:
            return 42 if os.strerror(errno.EFBIG) in str(error) else 1
        return 2

    assert in_fork(saver) == 42
    assert step_names(tmp_path) == ["step_000005"]
    assert_holds(find(tmp_path), 5)


_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


@pytest.mark.parametrize("second", [10, 5], ids=["next step", "same step again"])
def test_killed_before_every_single_file_operation(tmp_path, second):
    """SIGKILL before the 1st, 2nd, 3rd ... file operation of a save, until one gets through."""
    for point in range(400):
        run_dir = tmp_path / str(point)
        save(run_dir, 5, keep=1)

        def saver(run_dir=run_dir, point=point) -> int:
            seen = 0

            def hook(event: str, _arguments: tuple) -> None:
                nonlocal seen
                if event in _EVENTS:
                    seen += 1
                    if seen > point:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            save(run_dir, second, keep=1)
            return 0

        status = in_fork(saver)
        checkpoint.sweep(run_dir)
        found = find(run_dir)
        assert_holds(found, found.step)
        assert found.step in (5, second)
        assert_all_whole(run_dir)
        assert not [name for name in step_names(run_dir) if name.startswith("tmp_")]
        if status == 0:
            break
        assert status == -signal.SIGKILL
    else:
        pytest.fail("the save never got through")
    assert point > 15
    assert found.step == second


def test_killed_at_random_times(tmp_path):
    draw = random.Random(0)
    save(tmp_path, 1)
    reached = set()
    for _ in range(50):
        first = find(tmp_path).step + 1

        child = os.fork()
        if child == 0:
            try:
                for step in range(first, first + 1000):
                    save(tmp_path, step)
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.002, 0.06))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        found = find(tmp_path)
        assert_holds(found, found.step)
        assert found.step >= first - 1
        assert_all_whole(tmp_path)
        reached.add(found.step)
    assert len(reached) > 5
    checkpoint.sweep(tmp_path)
    assert all(name.startswith("step_") for name in step_names(tmp_path))


def test_a_full_disk_speaks_of_earlier_checkpoints_only_where_there_are(tmp_path):
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"\(No space left on device\); make room .* start again"):
        save(tmp_path, 5, model_files=full)
    save(tmp_path, 5)
    with pytest.raises(UserError, match="earlier checkpoints are intact; .*--resume auto"):
        save(tmp_path, 10, model_files=full)
