"""Inputs that no operator can take: a clear error in each implementation."""

from __future__ import annotations

import pytest
import torch
from operator_inputs import (
    FP32,
    LOSSES,
    ROWS,
    VOCAB,
    call,
    gradient,
    impls,
    losses,
    main_input,
    make,
    operators,
)
from torch.testing import assert_close

from polymath_fast.kernels import PolicyLossSpec, faults, group_advantages


@operators
@impls
@pytest.mark.parametrize("label", [-1, -100, VOCAB, VOCAB + 1, 2**40])
def test_labels_outside_the_vocabulary(op: str, impl: str, label: int) -> None:
    given = make(op)
    given["targets"][3] = label
    with pytest.raises(ValueError, match=rf"{label}.*outside \[0, {VOCAB}\)"):
        call(op, given, impl=impl)


@operators
@impls
def test_the_advice_about_ignored_labels_works(op: str, impl: str) -> None:
    given, ignored = make(op), torch.arange(ROWS) % 3 == 0
    truth, _ = gradient(op, given, impl=impl)
    given["targets"][ignored] = -100
    masked = {"mask": ~ignored} if op in LOSSES else {}
    with pytest.raises(ValueError, match="any id in there, such as 0") as error:
        call(op, {**given, **masked}, impl=impl)
    assert ("mask=" in str(error.value)) == (op in LOSSES)
    given["targets"][ignored] = 0
    logprobs, found = gradient(op, {**given, **masked}, impl=impl)
    assert_close(logprobs[~ignored], truth[~ignored])
    if masked:
        assert not found[ignored].any()


@operators
@pytest.mark.parametrize("dtype", [FP32, torch.bool, torch.uint8, torch.int16])
def test_labels_of_another_kind(op: str, dtype: torch.dtype) -> None:
    given = make(op)
    given["targets"] = (given["targets"] % 2).to(dtype)
    with pytest.raises(ValueError, match="targets must be int64"):
        call(op, given)


@operators
def test_shapes_that_do_not_fit(op: str) -> None:
    given, name = make(op), main_input(op)
    for wrong in (given[name][0], given[name][None], given[name][:, :0]):
        with pytest.raises(ValueError, match=name):
            call(op, {**given, name: wrong})
    for wrong in (given["targets"][:-1], given["targets"][:, None]):
        with pytest.raises(ValueError, match="targets must be"):
            call(op, {**given, "targets": wrong})


@operators
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_numbers_that_are_no_floats(op: str, dtype: torch.dtype) -> None:
    given, name = make(op), main_input(op)
    with pytest.raises(ValueError, match="must be"):
        call(op, {**given, name: given[name].to(dtype)})


@operators
@pytest.mark.parametrize("what", ["main", "targets"])
def test_lists_are_no_tensors(op: str, what: str) -> None:
    given = make(op)
    name = main_input(op) if what == "main" else what
    with pytest.raises(ValueError, match=f"{name} must be a tensor"):
        call(op, {**given, name: given[name].tolist()})


@losses
@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("cu_seqlens", torch.tensor([0, 9, 6, 12]), "rise from 0"),
        ("cu_seqlens", torch.tensor([0, 6, 11]), "rise from 0"),
        ("cu_seqlens", torch.tensor([1, 6, 12]), "rise from 0"),
        ("cu_seqlens", torch.tensor([0.0, 6.0, 12.0]), "int32"),
        ("cu_seqlens", torch.tensor([], dtype=torch.int32), "int32"),
        ("advantages", torch.ones(3), "advantages must be"),
        ("advantages", torch.ones(2, 1), "advantages must be"),
        ("advantages", torch.ones(2, dtype=torch.int64), "advantages must be"),
        ("mask", torch.ones(ROWS), "mask must be bool"),
        ("mask", torch.ones(ROWS - 1, dtype=torch.bool), "mask must be bool"),
        ("old_logprobs", torch.ones(2), "old_logprobs must be"),
        ("ref_logprobs", torch.ones(ROWS, 1), "ref_logprobs must be"),
        ("importance_weights", torch.ones(5), "importance_weights must be"),
        ("advantages", torch.ones(2, device="meta"), "on cpu"),
        ("mask", torch.ones(ROWS, dtype=torch.bool, device="meta"), "on cpu"),
        ("cu_seqlens", torch.zeros(3, dtype=torch.int32, device="meta"), "on cpu"),
        ("targets", torch.zeros(ROWS, dtype=torch.int64, device="meta"), "meta"),
        ("advantages", [1.0, 2.0], "advantages must be a tensor"),
        ("cu_seqlens", [0, 6, 12], "cu_seqlens must be a tensor"),
        ("mask", [True] * ROWS, "mask must be a tensor"),
        ("old_logprobs", -1.0, "old_logprobs must be a tensor"),
    ],
)
def test_side_inputs_that_do_not_fit(op: str, name: str, wrong: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(op, {**make(op), name: wrong})


@pytest.mark.parametrize("op", ["linear_logprobs", "linear_grpo_loss"])
def test_heads_of_two_kinds(op: str) -> None:
    given = make(op)
    for wrong in (given["weight"].bfloat16(), given["weight"].to("meta"), given["weight"][:, :3]):
        with pytest.raises(ValueError, match="weight"):
            call(op, {**given, "weight": wrong})


@operators
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperatures_that_are_none(op: str, temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        if op in LOSSES:
            call(op, make(op), spec=PolicyLossSpec(temperature=temperature))
        else:
            call(op, make(op), temperature=temperature)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_group_advantages(impl: str) -> None:
    assert group_advantages(torch.zeros(0), 4, impl=impl).shape == (0,)
    rewards = torch.tensor([1.0, 2.0, 4.0, 1.0])
    every_other = torch.stack([rewards, rewards], 1)[:, 0]
    expected = group_advantages(rewards, 2, impl=impl)
    assert torch.equal(group_advantages(every_other, 2, impl=impl), expected)
    assert not group_advantages(torch.tensor(0.5).expand(4), 2, impl=impl).any()
    # one reward that is no number does not spread to another group
    for bad in (torch.inf, -torch.inf, torch.nan):
        found = group_advantages(torch.tensor([bad, 2.0, 4.0, 1.0]), 2, impl=impl)
        assert torch.equal(found[2:], expected[2:])
    for groups, message in (
        (3, "divide"),
        (0, ">= 1"),
        (torch.zeros(4), "integers"),
        (torch.zeros(3, dtype=torch.long), "shape"),
        (torch.zeros(4, dtype=torch.long, device="meta"), "meta"),
    ):
        with pytest.raises(ValueError, match=message):
            group_advantages(rewards, groups, impl=impl)
    with pytest.raises(ValueError, match="rewards must be"):
        group_advantages(rewards.long(), 2, impl=impl)


def test_a_note_made_while_sampling_is_read_while_learning(monkeypatch) -> None:
    """The first call of all may be under inference_mode; what it keeps is written to later."""
    monkeypatch.setattr(faults, "_notes", {})
    device = torch.device("cpu")
    with torch.inference_mode():
        note = faults.note_for(device)
    note[:2] = torch.tensor([(4 << 32) | 99, VOCAB])
    with pytest.raises(ValueError, match=r"targets\[3\] was 99 .* outside \[0, 70\)"):
        faults.raise_noted(device)
    faults.raise_noted(device)
