"""Saves of a small run, and what must be true of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from polymath_fast import checkpoint
from polymath_fast.folders import manifest
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
