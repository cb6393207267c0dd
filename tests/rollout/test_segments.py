"""Recording a loader's copies: what is noted, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from polymath_fast.errors import UserError
from polymath_fast.kernels import weight_sync
from polymath_fast.rollout.segments import View, record


def loader_of(copy: Callable[[str, Tensor], None]) -> Callable:
    def load(weights) -> None:
        for name, tensor in weights:
            copy(name, tensor)

    return load


def test_stacked_and_sliced_with_padding() -> None:
    flat = torch.randn(40)
    sources = {"a": flat[:12].view(3, 4), "b": flat[12:36].view(3, 8)}
    memory = torch.full((48,), 9.0, dtype=torch.bfloat16)
    targets = {"ab": memory[8:40].view(8, 4)}

    def copy(name: str, tensor: Tensor) -> None:
        if name == "a":
            targets["ab"].data[0:3].copy_(tensor)
        else:
            targets["ab"].data.narrow(0, 3, 3).copy_(tensor.narrow(1, 4, 4))
            targets["ab"].data[6:].fill_(0)

    plan = record(loader_of(copy), sources, targets, rank=1, world_size=2)
    assert plan.moves == (
        (View("a", 0, (3, 4), (4, 1)), View("ab", 0, (3, 4), (4, 1))),
        (View("b", 4, (3, 4), (8, 1)), View("ab", 12, (3, 4), (4, 1))),
    )
    assert (targets["ab"][:6] == 9).all() and (targets["ab"][6:] == 0).all()
    weight_sync(plan.table(sources, targets))
    expected = torch.cat([sources["a"], sources["b"][:, 4:], torch.zeros(2, 4)]).bfloat16()
    assert torch.equal(targets["ab"], expected)
    assert (memory[:8] == 9).all() and (memory[40:] == 9).all()


def test_a_tied_tensor_may_have_a_name_that_is_never_loaded() -> None:
    weight = torch.randn(4, 4)
    target = {"embed": torch.zeros(4, 4)}

    def copy(name: str, tensor: Tensor) -> None:
        if name == "embed":
            target["embed"].data.copy_(tensor)

    assert len(record(loader_of(copy), {"embed": weight, "head": weight}, target).moves) == 1
    with pytest.raises(UserError, match="no place for head"):
        record(loader_of(copy), {"embed": weight, "head": weight.clone()}, target)


@pytest.mark.parametrize(
    ("copy", "message"),
    [
        (lambda t, x: t[:2].copy_(x[:2]), r"into the engine's w \(element 8 of 16\)"),
        (lambda t, x: (t.copy_(x), t[3:].copy_(x[:1])), "w is written more than once, from x"),
        (lambda t, x: t.copy_(x[0]), r"x has a part of shape \(4,\) where the engine's w wants"),
        (lambda t, x: t.copy_(x * 2), "does more with x than copy it .aten.mul"),
        (lambda t, x: t.copy_(torch.cat([x[2:], x[:2]])), "does more with x than copy it .aten.c"),
        (lambda t, x: torch.zeros(4, 4).copy_(x), "copies x to memory that is no parameter"),
        (lambda t, x: t.copy_(x.narrow(0, 2, 3)), r"loader refused x \(4, 4\): .*start"),
        (lambda t, x: t.fill_(x[0, 0].item()), r"loader refused x \(4, 4\)"),
        (lambda t, x: t.fill_(1), "no place for x"),
        (lambda t, x: None, r"no learner tensor is loaded into the engine's w"),
    ],
)
def test_what_a_copy_cannot_express_is_refused(copy: Callable, message: str) -> None:
    target = {"w": torch.zeros(4, 4)}
    with pytest.raises(UserError, match=message):
        record(loader_of(lambda _, x: copy(target["w"].data, x)), {"x": torch.ones(4, 4)}, target)


def test_what_an_engine_leaves_over_is_refused() -> None:
    """vLLM's layers narrow a wider tensor to their own width without a word."""
    sources, target = {"x": torch.ones(4, 6)}, {"w": torch.zeros(4, 4)}
    load = loader_of(lambda _, x: target["w"].data.copy_(x.narrow(1, 0, 4)))
    with pytest.raises(UserError, match=r"16 of the 24 elements of x \(4, 6\)"):
        record(load, sources, target)
    assert not target["w"].any()
    with pytest.raises(UserError, match="16 of the 24 elements of x"):
        record(load, sources, target, rank=1, world_size=2)
    record(load, sources, target, rank=0, world_size=2)


def test_repacked_engines_are_refused() -> None:
    with pytest.raises(UserError, match="keeps w in a layout of its own.*--weight-sync reload"):
        record(lambda weights: None, {}, {"w": torch.zeros(0)})


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (View("w", 5, (2, 3), (3, 1)), [[5, 11]]),
        (View("w", 5, (2, 3), (8, 1)), [[5, 8], [13, 16]]),
        (View("w", 0, (2, 2, 2), (8, 4, 1)), [[0, 2], [4, 6], [8, 10], [12, 14]]),
        (View("w", 7, (), ()), [[7, 8]]),
        (View("w", 7, (0, 4), (4, 1)), []),
    ],
)
def test_intervals_by_hand(view: View, expected: list) -> None:
    assert view.intervals().tolist() == expected
