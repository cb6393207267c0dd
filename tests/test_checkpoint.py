"""Checkpoints: what is saved comes back, and nothing that can go wrong costs the previous one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymath_fast import checkpoint
from polymath_fast.errors import UserError
from polymath_fast.folders import manifest, step_folders
from polymath_fast.run import resuming

MODEL = {"name": "org/tiny", "shape": {"model_type": "llama", "hidden_size": 8, "vocab_size": 32}}


def model_files(step: int):
    """A stand-in for a Hugging Face folder whose weights hold the number of the step."""

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        save_file({"w": torch.full((64,), float(step))}, folder / "model.safetensors")

    return write


def save(run_dir: Path, step: int, **changes) -> Path:
    arguments = {
        "model_files": model_files(step),
        "trainer_tensors": {"master": torch.full((500,), float(step)), "count": torch.tensor(step)},
        "trainer_state": {"model": MODEL, "updates": step},
        "keep": 2,
        **changes,
    }
    return checkpoint.save(run_dir, step, **arguments)


def find(path: Path, skipped: list | None = None) -> checkpoint.Checkpoint | None:
    """A find that fails the test when it skips a checkpoint, unless the test collects them."""

    def on_skip(folder: Path, reason: str) -> None:
        assert skipped is not None, f"{folder} skipped: {reason}"
        skipped.append((folder.name, reason))

    return resuming.find(path, on_skip=on_skip)


def assert_holds(found: checkpoint.Checkpoint, step: int) -> None:
    assert found.step == step
    assert found.state["updates"] == step
    assert found.tensors()["master"].tolist() == [float(step)] * 500
    assert load_file(found.path / "model.safetensors")["w"].tolist() == [float(step)] * 64


def assert_all_whole(run_dir: Path) -> None:
    """No folder has the name of a checkpoint without being one."""
    for folder in (run_dir / "checkpoints").glob("step_*"):
        manifest.verify(folder)


def step_names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_round_trip_keeps_dtypes_and_values(tmp_path):
    tensors = {
        "bf16": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
        "fp32": torch.tensor([[0.1, 1e-38], [3e38, -0.0]]),
        "bytes": torch.arange(256, dtype=torch.uint8),
    }
    state = {"model": MODEL, "text": "\u00e9 \U0001f600", "big": 2**63, "list": [1, None, True]}
    path = save(tmp_path, 7, trainer_tensors=tensors, trainer_state=state)
    assert path == tmp_path / "checkpoints" / "step_000007"
    found = find(tmp_path)
    assert found.state == state
    for name, tensor in found.tensors().items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor.view(torch.uint8), tensors[name].view(torch.uint8))


def test_manifest_agrees_with_sha256sum(tmp_path):
    path = save(tmp_path, 1)
    listed = json.loads((path / "manifest.json").read_text())["files"]
    on_disk = {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file() and file.name != "manifest.json"
    }
    assert {name: entry["sha256"] for name, entry in listed.items()} == on_disk


def test_checkpoint_is_a_folder_that_transformers_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=40,
    )
    model = transformers.LlamaForCausalLM(config)
    path = save(tmp_path, 3, model_files=model.save_pretrained)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor([[1, 5, 7]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_newest_is_found_and_a_named_one_is_respected(tmp_path):
    for step in (5, 10):
        save(tmp_path, step)
    assert_holds(find(tmp_path), 10)
    assert_holds(find(tmp_path / "checkpoints" / "step_000005"), 5)


def test_steps_sort_by_number_not_by_name(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert find(tmp_path).step == 1_000_000


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


def test_a_note_of_the_user_does_no_harm(tmp_path):
    (save(tmp_path, 5) / "notes.txt").write_text("the good one")
    assert_holds(find(tmp_path), 5)


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_weights_are_not_saved(tmp_path, value, dtype):
    save(tmp_path, 5, keep=1)
    bad = torch.zeros(1000, dtype=dtype)
    bad[-1] = value

    def bad_model(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        save_file({"layer.w": bad}, folder / "model.safetensors")

    with pytest.raises(UserError, match="step 10 refused: master holds NaN or Inf"):
        save(tmp_path, 10, trainer_tensors={"master": bad}, keep=1)
    with pytest.raises(UserError, match=r"refused: layer\.w holds NaN or Inf"):
        save(tmp_path, 10, model_files=bad_model, keep=1)
    assert step_names(tmp_path) == ["step_000005"]
    assert_holds(find(tmp_path), 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_finite_values_are_saved(tmp_path, dtype):
    large = torch.full((3, 7), torch.finfo(dtype).max, dtype=dtype)
    save(tmp_path, 1, trainer_tensors={"master": large, "empty": torch.zeros(0)})
    assert torch.equal(find(tmp_path).tensors()["master"], large)


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


def test_programming_errors_are_not_dressed_up_as_disk_errors(tmp_path):
    with pytest.raises(TypeError):
        save(tmp_path, 1, trainer_state={"model": object()})
    with pytest.raises(ValueError, match="Out of range"):
        save(tmp_path, 1, trainer_state={"loss": float("nan")})
    assert step_names(tmp_path) == []


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


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path):
    folder = save(tmp_path, 1)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*.*")}
    assert modes["model.safetensors"] == modes["state.safetensors"] == modes["config.json"]


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


def test_a_torn_checkpoint_is_set_aside_and_takes_no_good_one_s_place(tmp_path):
    run = tmp_path / "run"
    paths = {step: save(run, step, keep=2) for step in (5, 10)}
    (paths[10] / "model.safetensors").write_bytes(b"other bytes")
    step_folders.set_aside(paths[10])
    assert (paths[10].parent / "torn_step_000010_1").is_dir()
    save(run, 10, keep=2)
    assert [step for step, _ in step_folders.steps(run / "checkpoints")] == [5, 10]
    assert checkpoint.sweep(run) == []


def test_a_full_disk_speaks_of_earlier_checkpoints_only_where_there_are(tmp_path):
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"\(No space left on device\); make room .* start again"):
        save(tmp_path, 5, model_files=full)
    save(tmp_path, 5)
    with pytest.raises(UserError, match="earlier checkpoints are intact; .*--resume auto"):
        save(tmp_path, 10, model_files=full)


def test_import_is_light():
    code = (
        "import sys, polymath_fast.checkpoint, polymath_fast.monitor, polymath_fast.report.page\n"
        "print(sorted({'torch', 'transformers', 'vllm', 'triton'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
