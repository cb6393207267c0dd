"""Parts of the optimizer's state on disk: who writes them, and saves that fail."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sharded import made
from together import at_once

from polymath_fast import checkpoint
from polymath_fast.errors import EngineError, UserError
from polymath_fast.folders import tensor_file
from polymath_fast.kernels.flat_adamw import PART
from polymath_fast.ranks import Ranks
from polymath_fast.run import saving, sharing


@pytest.mark.parametrize(
    ("trouble", "kind", "message"),
    [("nan", UserError, "refused: exp_avg holds NaN"), ("disk", OSError, "No space left")],
)
def test_what_one_process_cannot_write_is_the_leaders_error(
    three: list[Ranks],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
    kind: type[Exception],
    message: str,
) -> None:
    path = tmp_path / "state.safetensors"
    fill = tensor_file.fill

    def full(path: Path, first_byte: int, pieces: Any) -> int:
        pieces = list(pieces)
        if trouble == "disk" and pieces and pieces[-1][0] > PART:
            raise OSError(28, "No space left on device")
        return fill(path, first_byte, pieces)

    monkeypatch.setattr(tensor_file, "fill", full)

    def work(ranks: Ranks) -> None:
        state = made("remainder", False, ranks).state
        if trouble == "nan" and ranks.rank == 2:
            state._tensors["exp_avg"][-1] = torch.nan
        if not ranks.leads:
            return sharing.contribute(ranks, state, 4)
        shared = sharing.shared(ranks, state, 4)
        with pytest.raises(kind, match=message):
            shared.fill(path, tensor_file.lay_out(path, shared.names, shared.elements, {}))

    at_once(three, work)


def test_a_checkpoint_without_a_part_is_none(tmp_path: Path) -> None:
    """Whoever fills the file in must have it filled before it gets its name."""

    def fill(path: Path, starts: dict[str, int]) -> None:
        tensor_file.fill(path, starts["a"], [(0, torch.ones(7))])
        raise EngineError("process 1 is gone")

    with pytest.raises(EngineError, match="process 1 is gone"):
        checkpoint.save(
            tmp_path,
            4,
            model_files=lambda folder: (folder / "config.json").write_text("{}"),
            trainer_tensors={},
            trainer_state={},
            keep=1,
            shared=checkpoint.Shared(("a",), 7, fill),
        )
    assert not list((tmp_path / "checkpoints").iterdir())


def test_the_file_is_as_safetensors_writes_it(tmp_path: Path) -> None:
    tensors = {name: torch.randn(1003) for name in ("master", "exp_avg")}
    starts = tensor_file.lay_out(tmp_path / "ours", tuple(tensors), 1003, {})
    for name, tensor in tensors.items():
        pieces = [(600, tensor[600:]), (0, tensor[:600])]
        assert tensor_file.fill(tmp_path / "ours", starts[name], pieces) == 1003
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def parts_of(ranks: Ranks, folder: Path, notes: list[str]) -> Any:
    """What a run's loop works with, 4 steps on, as far as a save needs it."""
    learner = SimpleNamespace(
        optimizer=made("remainder", True, ranks),
        save=lambda folder: (folder / "config.json").write_text("{}"),
    )
    monitor = SimpleNamespace(phase=lambda _: None, sync=lambda: None, note=notes.append)
    empty = SimpleNamespace(tensors=dict, to_json=list)
    return SimpleNamespace(
        ranks=ranks, learner=learner, monitor=monitor, speculation=empty, pending=empty,
        identity={"name": "m", "shape": {}}, run_dir=folder, steps_done=4, steps_saved=2,
        updates_done=learner.optimizer.updates,
    )  # fmt: skip


def test_members_that_wait_to_save_hear_of_a_failure_and_save(
    three: list[Ranks], tmp_path: Path
) -> None:
    """The leader fails after a step that is saved anyway; all others are at that save by then."""
    settings, notes = SimpleNamespace(shard_optimizer=True, keep_checkpoints=2), []

    def work(ranks: Ranks) -> int:
        parts = parts_of(ranks, tmp_path, notes)
        if ranks.leads:
            saving.rescue(settings, parts, EngineError("the weights did not arrive"))
        else:
            with pytest.raises(EngineError, match="another process of this run failed"):
                saving.save(settings, parts)
        return parts.steps_saved

    assert at_once(three, work) == [4, 4, 4]
    path = tmp_path / "checkpoints" / "step_000004"
    assert notes == [f"saved {path}"]
    found = checkpoint.load(path, 4).tensors()
    for name, tensor in made("remainder", True).tensors().items():
        assert torch.equal(found[name], tensor), name


def test_a_process_that_ends_during_a_save_leaves_no_checkpoint(
    three: list[Ranks], tmp_path: Path
) -> None:
    settings = SimpleNamespace(shard_optimizer=True, keep_checkpoints=2)

    def work(ranks: Ranks) -> str:
        parts = parts_of(ranks, tmp_path, [])
        if ranks.rank == 2:
            sharing.require_alike(ranks, 4, 0)
            ranks._channel.close()
            return "step 4 could not be saved"
        with pytest.raises(EngineError) as error:
            saving.save(settings, parts)
        if ranks.leads:
            for child in ranks._children:
                child.channel.close()
        return str(error.value)

    said = at_once(three, work)
    assert all("step 4 could not be saved" in each for each in said)
    assert "one of the 3 processes of this run" in said[0] and "nothing was saved" in said[0]
    assert not list((tmp_path / "checkpoints").iterdir())


def test_processes_that_are_at_different_updates_save_nothing(three: list[Ranks]) -> None:
    def work(ranks: Ranks) -> str:
        with pytest.raises(EngineError) as error:
            sharing.require_alike(ranks, 4, 8 - (ranks.rank == 2))
        return str(error.value)

    assert at_once(three, work) == ["process 2 has made other updates than process 0"] * 3
