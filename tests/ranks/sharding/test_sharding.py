"""The optimizer's state in parts: three processes, played by threads, against one with it all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sharded import FORMS, STORAGES, made, train
from together import at_once

from polymath_fast.folders import tensor_file
from polymath_fast.kernels.flat_adamw import PART
from polymath_fast.learner.optimizer import FlatAdamW
from polymath_fast.learner.sharding import bounds
from polymath_fast.ranks import Ranks
from polymath_fast.run import sharing


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
