"""What a checkpoint holds: values and dtypes, files that others can read, only finite numbers."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from saving import MODEL, assert_holds, find, save, step_names

from polymath_fast.errors import UserError


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


def test_a_note_of_the_user_does_no_harm(tmp_path):
    (save(tmp_path, 5) / "notes.txt").write_text("the good one")
    assert_holds(find(tmp_path), 5)


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


def test_programming_errors_are_not_dressed_up_as_disk_errors(tmp_path):
    with pytest.raises(TypeError):
        save(tmp_path, 1, trainer_state={"model": object()})
    with pytest.raises(ValueError, match="Out of range"):
        save(tmp_path, 1, trainer_state={"loss": float("nan")})
    assert step_names(tmp_path) == []


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path):
    folder = save(tmp_path, 1)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*.*")}
    assert modes["model.safetensors"] == modes["state.safetensors"] == modes["config.json"]


def test_import_is_light():
    code = (
        "import sys, polymath_fast.checkpoint, polymath_fast.monitor, polymath_fast.report.page\n"
        "print(sorted({'torch', 'transformers', 'vllm', 'triton'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
