"""Folders of earlier runs: who may write to them again."""

from __future__ import annotations

import shlex

import pytest
from earlier_runs import FLAGS, earlier_run

from polymath_fast.errors import UserError
from polymath_fast.folders.run_folder import LOCK_FILE, prepare


@pytest.mark.parametrize("left", ["metrics.jsonl", "completions.jsonl", ".config.toml.4711"])
def test_a_run_that_ended_before_its_first_step_may_start_over(tmp_path, left):
    (tmp_path / LOCK_FILE).touch()
    (tmp_path / "config.toml").write_text("seed = 0\n")
    (tmp_path / left).touch()
    assert prepare(str(tmp_path), resume=None) == tmp_path
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(UserError, match="holds an earlier run"):
        prepare(str(tmp_path), resume=None)


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
