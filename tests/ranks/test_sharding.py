"""The optimizer's state in parts: three processes, played by threads, against one with it all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from together import at_once
from torch import nn

from polymath_fast import checkpoint
from polymath_fast.config import Config
from polymath_fast.errors import EngineError, UserError
from polymath_fast.folders import tensor_file
from polymath_fast.kernels.flat_adamw import PART
from polymath_fast.learner import offload, optimizer_state
from polymath_fast.learner.flat_storage import FlatStorage
from polymath_fast.learner.optimizer import FlatAdamW
from polymath_fast.learner.sharding import bounds
from polymath_fast.ranks import ALONE, Ranks
from polymath_fast.run import saving, sharing

SETTINGS: dict[str, Any] = {"weight_decay": 0.1, "max_grad_norm": 0.7, "num_processes": 3}
FORMS = {
    "float32 master": (torch.bfloat16, {}),
    "remainder": (torch.bfloat16, {"master_weights": "remainder"}),
    "float32 weights": (torch.float32, {}),
    "off-loaded": (torch.bfloat16, {"master_weights": "remainder", "offload_optimizer": True}),
}
STORAGES = pytest.mark.parametrize("foreign", [False, True], ids=["own storage", "foreign storage"])
SHAPES = {"table": (3, PART // 2 + 77), "inner": (5, 300), "scale": (PART // 4,)}
PLACES = {"inner": PART + 9, "scale": 7, "table": PART + 3000}  # with gaps, in another order


class Model(nn.Module):
    """Weights that end neither with a part nor with each other."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            values = torch.randn(shape, generator=generator).to(dtype)
            setattr(self, name, nn.Parameter(values))


def made(form: str, foreign: bool, ranks: Ranks = ALONE) -> FlatAdamW:
    """The optimizer of one process; alone it keeps everything."""
    dtype, more = FORMS[form]
    more = more | {"shard_optimizer": ranks.size > 1}
    storage = None
    if foreign:
        room = torch.zeros(3 * PART + 999, dtype=dtype)
        storage = FlatStorage(room, {name: (PLACES[name], SHAPES[name]) for name in SHAPES})
    model = Model(dtype)
    optimizer = FlatAdamW(model, Config(**SETTINGS | more), storage, ranks)
    optimizer.model = model
    return optimizer


def train(optimizer: FlatAdamW, steps: range, share: int = 1) -> list[float]:
    """Updates with gradients of which each process has an equal, exact share; their norms."""
    norms = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in optimizer.model.parameters():
            drawn = torch.randint(-64, 64, parameter.shape, generator=generator) * 3 / 128
            (parameter * (drawn / share).to(parameter)).sum().backward()
        norm, updated = optimizer.step(1e-3)
        assert updated
        norms.append(norm.item())
    return norms


@pytest.fixture(autouse=True)
def offloads_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, too, where it saves nothing; in chunks that do not end with parts."""
    monkeypatch.setattr(optimizer_state, "require_gpu", lambda _: None)
    monkeypatch.setattr(offload.Offloaded.__init__, "__defaults__", (10_007,))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("elements", [1, PART, PART + 1, 5 * PART - 1, 7_615_616_512])
def test_parts_are_even_complete_and_aligned(elements: int, size: int) -> None:
    found = bounds(elements, size)
    assert found[0] == 0 and found[-1] == elements and found == sorted(found)
    assert all(first % PART == 0 for first in found[:-1] if first < elements)
    sizes = [last - first for first, last in zip(found, found[1:], strict=False)]
    assert len(sizes) == size and max(sizes) <= -(-elements // size) + PART


@STORAGES
@pytest.mark.parametrize("form", FORMS)
def test_parts_train_save_and_resume_as_the_whole_bit_for_bit(
    three: list[Ranks], tmp_path: Path, form: str, foreign: bool
) -> None:
    whole = made(form, foreign)
    expected = train(whole, range(4))
    rest = {"history.steps": torch.arange(5, dtype=torch.int32)}
    train(middle := made(form, foreign), range(2))
    save_file({name: t.clone() for name, t in middle.tensors().items()}, tmp_path / "middle")

    def work(ranks: Ranks) -> FlatAdamW:
        straight, resumed = (made(form, foreign, ranks) for _ in range(2))
        assert train(straight, range(4), 2 if ranks.leads else 4) == expected
        with safe_open(tmp_path / "middle", framework="pt") as file:
            resumed.load({name: file.get_slice(name) for name in file.keys()}, 2)  # noqa: SIM118
        assert torch.equal(resumed.live, middle.live)
        train(resumed, range(2, 4), 2 if ranks.leads else 4)
        assert torch.equal(straight.live, whole.live) and torch.equal(resumed.live, whole.live)
        path = tmp_path / "state.safetensors"
        shared = sharing.shared(ranks, resumed.state, 4)
        if ranks.leads:
            shared.fill(path, tensor_file.lay_out(path, shared.names, shared.elements, rest))
        else:
            sharing.contribute(ranks, resumed.state, 4)
        return resumed

    parts = at_once(three, work)
    saved = load_file(tmp_path / "state.safetensors")
    assert torch.equal(saved.pop("history.steps"), rest["history.steps"])
    assert saved.keys() == whole.tensors().keys()
    for name, tensor in whole.tensors().items():
        assert torch.equal(saved[name], tensor), name
    held = [sum(t.numel() for t in each.state._tensors.values()) for each in parts]
    assert sum(held) == len(whole.state._tensors) * whole.live.numel() > max(held)


def test_a_gradient_that_is_not_finite_in_one_part_changes_no_weight(three: list[Ranks]) -> None:
    before = made("remainder", False).live.clone()

    def work(ranks: Ranks) -> bool:
        optimizer = made("remainder", False, ranks)
        if ranks.rank == 1:
            optimizer.grad[-1] = torch.inf
        norm, updated = optimizer.step(1e-3)
        assert not norm.isfinite() and optimizer.updates == 0
        return bool(updated) or not torch.equal(optimizer.live, before)

    assert at_once(three, work) == [False] * 3


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
