"""Which checkpoint a run goes on from, and of which model it must be."""

from __future__ import annotations

import pytest
from saving import MODEL, assert_holds, find, save

from polymath_fast import checkpoint
from polymath_fast.errors import UserError
from polymath_fast.folders import step_folders
from polymath_fast.run import resuming


def test_newest_is_found_and_a_named_one_is_respected(tmp_path):
    for step in (5, 10):
        save(tmp_path, step)
    assert_holds(find(tmp_path), 10)
    assert_holds(find(tmp_path / "checkpoints" / "step_000005"), 5)


def test_steps_sort_by_number_not_by_name(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert find(tmp_path).step == 1_000_000


def test_resume_option(tmp_path):
    def resume(option):
        return resuming.resume(option, tmp_path, on_skip=lambda *_: None)

    assert resume("auto") is None
    with pytest.raises(UserError, match="--resume .* is neither auto, nor"):
        resume(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="--resume .* is neither auto, nor"):
        resume(str(tmp_path))
    path = save(tmp_path, 5)
    assert resume("auto").step == resume(str(path)).step == resume(str(tmp_path)).step == 5


def test_other_model_is_refused_by_name_and_by_shape(tmp_path):
    save(tmp_path, 5)
    found = find(tmp_path)
    moved = {**MODEL, "name": "/data/models/tiny"}
    found.require_model(moved)
    with pytest.raises(UserError, match=r"org/tiny, not of org/other.*--model org/tiny"):
        found.require_model({**MODEL, "name": "org/other"})
    with pytest.raises(UserError, match="hidden_size 8 / 16"):
        found.require_model({"name": "org/tiny", "shape": {**MODEL["shape"], "hidden_size": 16}})


def test_identity_ignores_what_a_newer_transformers_adds():
    config = {"model_type": "llama", "hidden_size": 8, "transformers_version": "5.16", "dtype": "x"}
    newer = {**config, "transformers_version": "5.20", "new_option": 1}
    assert checkpoint.model_identity("m", config) == checkpoint.model_identity("m", newer)


def test_going_back_to_a_checkpoint_leaves_the_later_ones(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    paths = {step: save(run, step, keep=3) for step in (5, 10, 15)}

    def go_back(option, folder):
        found = resuming.resume(option, run, on_skip=lambda *_: None)
        resuming.go_back(option, folder, found)
        return [step for step, _ in step_folders.steps(run / "checkpoints")]

    assert go_back("auto", run) == go_back(str(run), run) == [5, 10, 15]
    assert go_back(str(paths[5]), other) == [5, 10, 15]  # another run begins from there
    (paths[10] / "config.json").write_text("torn")
    assert go_back(str(paths[10]), run) == [5, 10, 15]  # an earlier one stands in for it
    assert go_back(str(paths[5]), run) == [5]
    assert resuming.resume("auto", run, on_skip=lambda *_: None).step == 5
