"""Output folders that cannot be one, and two runs that want the same one."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polymath_fast.errors import UserError
from polymath_fast.folders import run_folder
from polymath_fast.folders.run_folder import LOCK_FILE, RunLock, prepare


def earlier_run(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / LOCK_FILE).touch()
    (path / "config.toml").write_text("seed = 0\n")
    (path / "metrics.jsonl").write_text('{"step": 1}\n')
    return path


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


@pytest.mark.parametrize("left", ["metrics.jsonl", "completions.jsonl", ".config.toml.4711"])
def test_a_run_that_ended_before_its_first_step_may_start_over(tmp_path, left):
    (tmp_path / LOCK_FILE).touch()
    (tmp_path / "config.toml").write_text("seed = 0\n")
    (tmp_path / left).touch()
    assert prepare(str(tmp_path), resume=None) == tmp_path
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(UserError, match="holds an earlier run"):
        prepare(str(tmp_path), resume=None)


FLAGS = [
    *("--model", "random:tiny", "--question", "Say something.", "--answer", "e"),
    *("--engine", "transformers", "--num-generations", "2", "--groups-per-step", "1"),
    *("--max-completion-length", "4", "--max-steps", "1"),
]


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


def test_commands_call_the_python_that_runs(tmp_path, monkeypatch):
    """`make setup` makes an environment that nobody has to activate; a bare `python` is another."""
    python = tmp_path / "my venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    commands = (
        lambda: run_folder.resume_command(tmp_path / "run"),
        lambda: run_folder.report_command(tmp_path / "run"),
        lambda: run_folder.evaluate_command(tmp_path / "run"),
    )
    for folder, path, expected in (
        (tmp_path, "", "my venv/bin/python"),
        (tmp_path / "my venv", "", "bin/python"),
        (Path("/"), str(python.parent), "python"),
    ):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PATH", path)
        assert {shlex.split(command())[0] for command in commands} == {expected}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("PATH", "")
    assert shlex.split(commands[0]())[0] == str(python)


@pytest.mark.parametrize("words", [["--instruction", ""], ["--template", "plain"]])
def test_the_command_that_scores_a_checkpoint_asks_as_the_run_did(tmp_path, words, capsys):
    """A policy that was trained on other prompts scores worse on the default ones."""
    from polymath_fast import evaluate, train
    from polymath_fast.samples.prompts import DEFAULT_INSTRUCTION

    common = ["--max-steps", "1", "--num-generations", "2", "--groups-per-step", "1"]
    common += ["--max-completion-length", "4", "--eval-dataset", "--model", "random:tiny"]
    run_dir = tmp_path / "run"
    assert train.main([*common, *words, "--output-dir", str(run_dir)]) == 0
    command = shlex.split(capsys.readouterr().out.partition("try it:")[2].splitlines()[0])
    asked = command[command.index("--model") :]
    cheap = ["--max-problems", "1", "--engine", "transformers", "--device", "cpu"]
    assert evaluate.main([*asked, *cheap, "--output-dir", str(tmp_path / "like")]) == 0
    assert "note: the run" not in capsys.readouterr().out
    plain = [*asked[:2], *cheap, "--max-completion-length", "4"]
    assert evaluate.main([*plain, "--output-dir", str(tmp_path / "unlike")]) == 0
    assert f"asked with {'--template chat ' * (words[0] != '--template')}{shlex.join(words)}, " in (
        capsys.readouterr().out
    )
    ways = []
    for name in ("run", "like", "unlike"):
        row = json.loads((tmp_path / name / "completions.jsonl").read_text().splitlines()[0])
        ways.append((DEFAULT_INSTRUCTION in row["prompt"], "<|im_start|>" in row["prompt"]))
    assert ways[0] == ways[1] != ways[2] == (True, True)


def test_command_for_a_name_that_looks_like_a_flag():
    words = shlex.split(run_folder.resume_command(Path("-dash")))
    assert not {"-dash", "-dash/config.toml"} & set(words)
    assert words[words.index("--output-dir") + 1] == "./-dash"


def test_default_name_is_the_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = prepare(None, resume=None)
    assert run_dir.parent == Path("runs") and run_dir.is_dir()
    time.strptime(run_dir.name, "%Y%m%d-%H%M%S")


def test_empty_folder_and_resume_auto_in_a_new_one(tmp_path):
    assert prepare(str(tmp_path), resume=None) == tmp_path
    assert prepare(str(tmp_path / "new"), resume="auto").is_dir()


def test_folder_of_a_run_that_ended_before_its_first_step(tmp_path):
    (tmp_path / LOCK_FILE).touch()
    (tmp_path / "config.toml").touch()
    assert prepare(str(tmp_path), resume=None) == tmp_path


def test_earlier_run_needs_resume(tmp_path):
    run_dir = earlier_run(tmp_path / "my run")
    (tmp_path / "my run-2").mkdir()
    with pytest.raises(UserError, match="--resume auto") as caught:
        prepare(str(run_dir), resume=None)
    assert shlex.quote(f"{run_dir}-3") in str(caught.value)
    assert prepare(str(run_dir), resume="auto") == run_dir


def test_resume_from_elsewhere_overwrites_no_other_run(tmp_path):
    run_dir, other = earlier_run(tmp_path / "run"), earlier_run(tmp_path / "other")
    (tmp_path / "link").symlink_to(run_dir)
    with pytest.raises(UserError, match="holds another run than --resume"):
        prepare(str(run_dir), resume=str(other / "checkpoints" / "step_000005"))
    for resume in (run_dir / "checkpoints" / "step_000005", tmp_path / "link", run_dir):
        assert prepare(str(run_dir), resume=str(resume)) == run_dir
    assert prepare(str(tmp_path / "new"), resume=str(other)).is_dir()


@pytest.mark.parametrize("resume", ["nonsense", "{run}", "{run}/checkpoints/step_000001"])
@pytest.mark.parametrize("folder", ["run", "new"])
def test_a_resume_that_names_nothing_is_said_and_leaves_nothing(tmp_path, capsys, resume, folder):
    from polymath_fast import train

    run_dir = earlier_run(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    flags = [*FLAGS, "--output-dir", str(tmp_path / folder)]
    for more in ([], ["--dry-run"]):
        assert train.main([*flags, "--resume", resume.format(run=run_dir), *more]) == 2
        said = capsys.readouterr().err
        assert "is neither auto, nor a run folder with a checkpoint, nor a checkpoint" in said
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_copied_run_without_its_lock_file_is_still_a_run(tmp_path):
    run_dir = earlier_run(tmp_path / "copy")
    (run_dir / LOCK_FILE).unlink()
    assert prepare(str(run_dir), resume="auto") == run_dir


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


def test_folder_that_vanished(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        RunLock(tmp_path / "gone").acquire()
