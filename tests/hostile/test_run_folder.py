"""Output folders of any name, and such as cannot be one."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import time
from pathlib import Path

import pytest
from earlier_runs import FLAGS, earlier_run

from polymath_fast.errors import UserError
from polymath_fast.folders import run_folder
from polymath_fast.folders.run_folder import LOCK_FILE, RunLock, prepare


@pytest.mark.parametrize(
    "name",
    [
        "new",
        "a/b/c",
        "with space",
        "\u00fcn\u00efc\u00f6de \u4f60\u597d",
        "new\nline",
        "-dash",
        "$(x)",
    ],
)
def test_new_folder_of_any_name(tmp_path, name):
    run_dir = prepare(str(tmp_path / name), resume=None)
    assert run_dir.is_dir() and str(run_dir) == str(tmp_path / name)
    with RunLock(run_dir):
        assert [path.name for path in run_dir.iterdir()] == [LOCK_FILE]
    words = shlex.split(run_folder.resume_command(run_dir))
    assert words[1:3] == ["-m", "polymath_fast.train"]
    assert words[words.index("--output-dir") + 1] == str(run_dir)
    assert words[words.index("--config") + 1] == str(run_dir / "config.toml")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """Shells leave it alone in --output-dir=~/run, and nobody expands it in a TOML file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run_dir = prepare("~/run", resume=None)
    assert run_dir == tmp_path / "run" and run_dir.is_dir() and not (tmp_path / "~").exists()
    earlier_run(run_dir)
    assert prepare("~/run", resume="~/run") == run_dir


@pytest.mark.parametrize(("name", "folder"), [("checkpoints", False), ("metrics.jsonl", True)])
def test_what_a_run_will_write_must_not_be_something_else(tmp_path, name, folder):
    earlier_run(tmp_path / "run")
    path = tmp_path / "run" / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.mkdir() if folder else path.write_text("")
    kind = "folder" if folder else "file"
    with pytest.raises(UserError, match=f"{name} is a {kind}: move it, or choose another"):
        prepare(str(tmp_path / "run"), resume="auto")


def test_a_default_name_that_is_taken_gets_a_number(tmp_path, monkeypatch):
    """Two runs in one second, or a clock that was put back into an earlier run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "runs/20260101-000000")
    earlier_run(tmp_path / "runs/20260101-000000")
    made = [prepare(None, resume=resume) for resume in (None, None, "auto")]
    assert [path.name for path in made] == [f"20260101-000000-{n}" for n in (2, 3, 4)]
    assert all(not list(path.iterdir()) for path in made)


@pytest.mark.parametrize("where", ["lock", "sweep", "config", "rows"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_the_start_is_one_line(tmp_path, monkeypatch, capsys, where, code):
    from polymath_fast import train

    run_dir = earlier_run(tmp_path / "run")
    rows = (run_dir / "metrics.jsonl").read_bytes()

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    if where == "lock":
        monkeypatch.setattr(run_folder.os, "pwrite", refuse)
    elif where == "rows":  # cutting metrics.jsonl is the first to flush
        monkeypatch.setattr(os, "fsync", refuse)
    elif where == "config":
        monkeypatch.setattr(Path, "write_text", refuse)
    else:  # what a kill left between two renames of a checkpoint
        (run_dir / "checkpoints/tmp_000001_old").mkdir(parents=True)
        monkeypatch.setattr(Path, "rename", refuse)
    assert train.main([*FLAGS, "--resume", "auto", "--output-dir", str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --output-dir") and os.strerror(code) in error
    assert error.count("\n") == 1
    assert (run_dir / "metrics.jsonl").read_bytes() == rows
    assert not list(run_dir.glob(".config.toml.*"))
    monkeypatch.undo()
    with RunLock(run_dir):  # nobody holds it any more
        pass


def test_default_name_is_the_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = prepare(None, resume=None)
    assert run_dir.parent == Path("runs") and run_dir.is_dir()
    time.strptime(run_dir.name, "%Y%m%d-%H%M%S")


@pytest.mark.parametrize("resume", [None, "auto"])
def test_foreign_folder_is_refused_and_left_alone(tmp_path, resume):
    for name in ("a.txt", "config.toml", "thesis.tex", "z.txt"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=r"a\.txt, config\.toml, thesis\.tex, \.\.\.") as caught:
        prepare(str(tmp_path), resume=resume)
    assert f"{tmp_path}-2" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("a.txt", "config.toml", "thesis.tex", "z.txt"),
    ]


def test_current_folder_with_foreign_files(tmp_path, monkeypatch):
    (tmp_path / "a.txt").touch()
    monkeypatch.chdir(tmp_path)
    for name in (".", "..", "./"):
        with pytest.raises(UserError, match="--output-dir .*run-2"):
            prepare(name, resume=None)


def test_file_instead_of_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(UserError, match=f"{path} is a file.*for example {path}-run"):
        prepare(str(path), resume=None)
    with pytest.raises(UserError, match="cannot be written"):
        prepare(str(path / "below"), resume=None)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["nul\0byte", "x" * 300, "loop/run"])
def test_impossible_names(tmp_path, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="cannot be written .*for example runs/first"):
        prepare(str(tmp_path / name), resume=None)


def as_nobody(action) -> int:
    """Exit status of `action` in a child without root's rights."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            if os.geteuid() == 0:
                os.setegid(65534)
                os.seteuid(65534)
            code = action()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("below", ["", "new"])
def test_read_only_folder(tmp_path, below):
    for folder in (tmp_path, *tmp_path.parents[:2]):
        os.chmod(folder, 0o755)
    os.chmod(tmp_path, 0o555)

    def refuse() -> int:
        try:
            with RunLock(prepare(str(tmp_path / below), resume=None)):
                return 1
        except UserError as error:
            return 42 if "Permission denied" in str(error) else 2

    assert as_nobody(refuse) == 42
    assert list(tmp_path.iterdir()) == []


def test_folder_that_vanished(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        RunLock(tmp_path / "gone").acquire()
