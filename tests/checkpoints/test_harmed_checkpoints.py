"""A checkpoint that was changed, torn or cannot be read: it is refused and an earlier one taken."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
from saving import assert_holds, find, save

from polymath_fast import checkpoint
from polymath_fast.errors import UserError
from polymath_fast.folders import manifest, step_folders


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "trainer/state.safetensors",
        "trainer/state.json",
        "manifest.json",
    ],
)
@pytest.mark.parametrize(
    "harm",
    [flip_a_byte, Path.unlink, lambda path: os.truncate(path, path.stat().st_size - 1)],
    ids=["flipped", "missing", "truncated"],
)
def test_harmed_file_is_refused_and_the_previous_checkpoint_taken(tmp_path, name, harm):
    for step in (5, 10):
        save(tmp_path, step)
    harm(tmp_path / "checkpoints" / "step_000010" / name)
    for path in (tmp_path, tmp_path / "checkpoints" / "step_000010"):
        skipped: list = []
        assert_holds(find(path, skipped), 5)
        assert [folder for folder, _ in skipped] == ["step_000010"]
        assert name in skipped[0][1]


def rewrite_manifest(path: Path, change) -> None:
    content = json.loads((path / "manifest.json").read_text())
    change(content)
    (path / "manifest.json").write_text(manifest.seal(content))


def add_outside_file(path: Path) -> None:
    (path.parent / "x").write_bytes(b"x")
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    rewrite_manifest(path, lambda content: content["files"].update({"../x": entry}))


def add_index_with_outside_shard(path: Path) -> None:
    (path.parent / "x").write_bytes(b"x")
    text = json.dumps({"weight_map": {"w": "../x"}})
    index = path / "model.safetensors.index.json"
    index.write_text(text)
    entry = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    rewrite_manifest(path, lambda content: content["files"].update({index.name: entry}))


def replace_by_link(path: Path) -> None:
    target = path.parent / "elsewhere.safetensors"
    (path / "model.safetensors").rename(target)
    (path / "model.safetensors").symlink_to(target)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (add_outside_file, "outside the folder"),
        (add_index_with_outside_shard, "'../x'"),
        (replace_by_link, "is a link"),
        (lambda path: (path / "pytorch_model.bin").write_bytes(b"\x80"), "not in the manifest"),
        (lambda path: (path / "adapter_config.json").write_text("{}"), "not in the manifest"),
        (lambda path: (path / "modeling.py").write_text("evil()"), "not in the manifest"),
        (lambda path: (path / "manifest.json").write_text("[]"), "lists no files"),
        (lambda path: (path / "manifest.json").write_text("[" * 100_000), "cannot be read"),
        (lambda path: rewrite_manifest(path, lambda c: c.update(format=2)), "format 2"),
        (lambda path: rewrite_manifest(path, lambda c: c.update(step=9)), "saved as step 9"),
        (
            lambda path: rewrite_manifest(path, lambda c: c["files"].pop("config.json")),
            "not in the manifest",
        ),
    ],
)
def test_folder_that_was_not_saved_like_this_is_refused(tmp_path, harm, reason):
    for step in (5, 10):
        save(tmp_path, step)
    harm(tmp_path / "checkpoints" / "step_000010")
    skipped: list = []
    assert_holds(find(tmp_path, skipped), 5)
    assert reason in skipped[0][1]


def test_all_torn_is_an_error_not_a_fresh_start(tmp_path):
    flip_a_byte(save(tmp_path, 5) / "config.json")
    skipped: list = []
    with pytest.raises(UserError, match="none of its 1 checkpoint"):
        find(tmp_path, skipped)
    assert len(skipped) == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_what_cannot_be_read_now_is_not_left_behind(tmp_path, monkeypatch, code):
    older, newer = save(tmp_path, 5), save(tmp_path, 10)
    plain = Path.read_text

    def fails(path, *arguments, **options):
        if path == newer / "manifest.json":
            raise OSError(code, os.strerror(code), str(path))
        return plain(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fails)
        with pytest.raises(UserError) as refusal:
            find(tmp_path)
        assert os.strerror(code) in str(refusal.value)
        assert f"--resume {older}" in str(refusal.value)
        assert_holds(find(older), 5)
    assert_holds(find(tmp_path), 10)


def test_a_torn_checkpoint_is_set_aside_and_takes_no_good_one_s_place(tmp_path):
    run = tmp_path / "run"
    paths = {step: save(run, step, keep=2) for step in (5, 10)}
    (paths[10] / "model.safetensors").write_bytes(b"other bytes")
    step_folders.set_aside(paths[10])
    assert (paths[10].parent / "torn_step_000010_1").is_dir()
    save(run, 10, keep=2)
    assert [step for step, _ in step_folders.steps(run / "checkpoints")] == [5, 10]
    assert checkpoint.sweep(run) == []
