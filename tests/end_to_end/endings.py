"""Where a run ended: its newest checkpoint, and whether two runs ended alike."""

from __future__ import annotations

from pathlib import Path

import torch

from polymath_fast import checkpoint
from polymath_fast.run import resuming


def newest(folder: Path) -> checkpoint.Checkpoint:
    def torn(path: Path, reason: str) -> None:
        raise AssertionError(f"{path}: {reason}")

    return resuming.find(folder, on_skip=torn)


def assert_same_end(one: Path, two: Path) -> None:
    """Weights, optimizer and completions of both runs are equal, bit for bit."""
    left, right = newest(one), newest(two)
    assert (left.step, left.state["updates"]) == (right.step, right.state["updates"])
    theirs = right.tensors()
    for name, tensor in left.tensors().items():
        assert torch.equal(tensor, theirs[name]), name
    for name in ("metrics.jsonl", "completions.jsonl"):
        assert (one / name).read_text().count("\n") == (two / name).read_text().count("\n")
    assert (one / "completions.jsonl").read_bytes() == (two / "completions.jsonl").read_bytes()
