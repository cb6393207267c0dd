"""What is at a path: a file, a folder, nothing, or nobody knows."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from polymath_fast.folders.kinds import exists, is_file, is_folder


def test_files_folders_and_links(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("gone")
    found = {
        name: (exists(tmp_path / name), is_file(tmp_path / name), is_folder(tmp_path / name))
        for name in ("file", "link", ".", "gone", "file/inside", "loop", "dangling", "zero\0byte")
    }
    assert found.pop("file") == found.pop("link") == (True, True, False)
    assert found.pop(".") == (True, False, True)
    assert set(found.values()) == {(False, False, False)}


@pytest.mark.parametrize("ask", [exists, is_file, is_folder])
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_what_the_disk_does_not_tell_is_not_taken_for_nothing(monkeypatch, code, ask) -> None:
    def fails(path: object, **_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "stat", fails)
    with pytest.raises(OSError, match=os.strerror(code)):
        ask(Path("model.safetensors"))
