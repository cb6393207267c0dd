"""Which checkpoints a save keeps and which it deletes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from saving import find, save, step_names

from polymath_fast.errors import UserError


def test_rotation_keeps_the_newest(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=3)
    assert step_names(tmp_path) == ["step_000003", "step_000004", "step_000005"]


def test_rotation_drops_the_abandoned_future_but_never_what_was_just_saved(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
    save(tmp_path, 15, keep=1)
    assert step_names(tmp_path) == ["step_000015"]


def test_torn_checkpoints_do_not_count_as_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (tmp_path / "checkpoints" / "step_000002" / "model.safetensors").unlink()
    save(tmp_path, 4, keep=3)
    assert step_names(tmp_path) == ["step_000001", "step_000003", "step_000004"]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize(
    ("method", "name"),
    [("read_text", "manifest.json"), ("stat", "model.safetensors"), ("stat", "step_000003")],
)
def test_rotation_neither_counts_nor_deletes_what_it_cannot_read(
    tmp_path, monkeypatch, code, method, name
):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    plain = getattr(Path, method)

    def fails(path, *arguments, **options):
        if path.name == name and "step_000003" in str(path):
            raise OSError(code, os.strerror(code), str(path))
        return plain(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, fails)
        save(tmp_path, 4, keep=2)
    assert step_names(tmp_path) == ["step_000002", "step_000003", "step_000004"]
    assert find(tmp_path / "checkpoints" / "step_000003").step == 3


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(UserError, match="use 2"):
        save(tmp_path, 1, keep=0)
