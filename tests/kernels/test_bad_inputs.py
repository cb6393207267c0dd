"""Hostile inputs to every operator: a clear error, or a right result, in each implementation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from polymath_fast.kernels import (
    PolicyLossSpec,
    faults,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logprobs,
    token_logprobs,
)
from polymath_fast.kernels.policy_loss.spec import LOSS_TYPES

ROWS, VOCAB, SIZE = 12, 70, 16
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
OPERATORS = ("token_logprobs", "linear_logprobs", "grpo_loss", "linear_grpo_loss")
LOSSES = ("grpo_loss", "linear_grpo_loss")
operators = pytest.mark.parametrize("op", OPERATORS)
losses = pytest.mark.parametrize("op", LOSSES)
impls = pytest.mark.parametrize("impl", ["cpu", "reference"])


def make(op: str, rows: int = ROWS, dtype: torch.dtype = FP32) -> dict[str, Tensor]:
    """Inputs by name."""
    generator = torch.Generator().manual_seed(3)
    given = {"targets": torch.randint(VOCAB, (rows,), generator=generator)}
    if op.startswith("linear"):
        given["hidden"] = torch.randn(rows, SIZE, generator=generator).to(dtype)
        given["weight"] = torch.randn(VOCAB, SIZE, generator=generator).to(dtype)
    else:
        given["logits"] = 3 * torch.randn(rows, VOCAB, generator=generator).to(dtype)
    if op.endswith("loss"):
        given["advantages"] = torch.tensor([1.0, -0.5])
        given["cu_seqlens"] = torch.tensor([0, rows // 2, rows], dtype=torch.int32)
    return given


def call(op: str, given: dict[str, Tensor], **options: object) -> tuple[Tensor, Tensor]:
    """Log-probs, and a scalar to differentiate."""
    function: Callable = {
        "token_logprobs": token_logprobs,
        "linear_logprobs": linear_logprobs,
        "grpo_loss": grpo_loss,
        "linear_grpo_loss": linear_grpo_loss,
    }[op]
    out = function(**given, **options)
    if isinstance(out, tuple):
        return out[0], out[0].sum() + 0.1 * out[1].sum()
    return out.logprobs, out.loss


def main_input(op: str) -> str:
    return "hidden" if op.startswith("linear") else "logits"


def gradient(op: str, given: dict[str, Tensor], **options: object) -> tuple[Tensor, Tensor]:
    """Log-probs and gradient of the main input."""
    name = main_input(op)
    given = {**given, name: given[name].detach().requires_grad_()}
    logprobs, scalar = call(op, given, **options)
    scalar.backward()
    return logprobs.detach(), given[name].grad


@operators
@impls
@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(op: str, impl: str, rows: int) -> None:
    logprobs, found = gradient(op, make(op, rows), impl=impl)
    assert logprobs.shape == (rows,) and len(found) == rows
    assert found.isfinite().all()


@losses
@impls
def test_one_trained_token_is_as_if_alone(op: str, impl: str) -> None:
    given = make(op)
    mask = torch.zeros(ROWS, dtype=torch.bool)
    _, nothing = gradient(op, {**given, "mask": mask}, impl=impl)
    assert not nothing.any()
    mask[4] = True
    _, found = gradient(op, {**given, "mask": mask}, impl=impl)
    alone = {n: t[4:5] if len(t) == ROWS else t for n, t in given.items()}
    alone |= {"advantages": torch.ones(1), "cu_seqlens": torch.tensor([0, 1])}
    assert_close(found[4:5], gradient(op, alone, impl=impl)[1])
    assert not found[~mask].any()


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


@operators
@impls
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_leaves_the_others_alone(op: str, impl: str, bad: float) -> None:
    given, name = make(op), main_input(op)
    if op in LOSSES:
        # a divisor of its own, and no gradient of the row in question
        options = {"spec": PolicyLossSpec(normalizer=1.0), "impl": impl}
    else:
        options = {"impl": impl}
    clean, expected = gradient(op, given, **options)
    broken = given[name].clone()
    broken[5] = bad
    logprobs, found = gradient(op, {**given, name: broken}, **options)
    good = torch.arange(ROWS) != 5
    assert logprobs[5].isnan()
    assert torch.equal(logprobs[good], clean[good])
    # one row less enters the products, which may then sum up in another order
    torch.testing.assert_close(found[good], expected[good], rtol=1e-5, atol=1e-6)
    assert not found[5].any()


@operators
@impls
def test_huge_and_equal_logits(op: str, impl: str) -> None:
    given = make(op, 3)
    if "logits" in given:
        logits = given["logits"]
        logits[0], logits[1], logits[2] = 7.0, 1e4 * logits[1].sign(), -1e4
    else:
        given["hidden"][0] = 0.0
        given["hidden"][1] *= 1e4
        given["hidden"][2] = 0.0
    logprobs, found = gradient(op, given, impl=impl)
    assert_close(logprobs[[0, 2]], torch.full((2,), VOCAB, dtype=FP32).log().neg())
    assert (logprobs <= 0).all() and found.isfinite().all()


@losses
@impls
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_overflow_at_masked_tokens(op: str, impl: str, loss_type: str) -> None:
    """0 * inf is NaN: a masked token must not enter any product."""
    given = make(op) | {"mask": torch.arange(ROWS) % 3 != 0}
    options = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    options |= {"max_completion_length": 8} if loss_type == "dr_grpo" else {}
    options |= {"dro_beta": 0.1} if loss_type == "dro" else {}
    spec = PolicyLossSpec(loss_type=loss_type, beta=0.1, **options)
    plain = torch.full((ROWS,), -2.0)
    results = []
    for far in (-2.0, -200.0, 1e3, -torch.inf, torch.nan):
        old = torch.where(given["mask"], plain, far)
        inputs = {**given, "old_logprobs": old, "ref_logprobs": old, "sampling_logprobs": old}
        results.append(gradient(op, inputs, spec=spec, impl=impl)[1])
    assert results[0].isfinite().all()
    for other in results[1:]:
        assert torch.equal(results[0], other)


@losses
@impls
@pytest.mark.parametrize("far", [1e3, -1e3])
def test_a_ratio_that_overflows_is_no_silent_nan(op: str, impl: str, far: float) -> None:
    given = make(op)
    old = torch.full((ROWS,), -2.0)
    old[2] = far
    out = {"grpo_loss": grpo_loss, "linear_grpo_loss": linear_grpo_loss}[op](
        **given, old_logprobs=old, impl=impl
    )
    _, found = gradient(op, {**given, "old_logprobs": old}, impl=impl)
    assert found.isfinite().all()
    assert out.loss.isfinite() or out.metrics["nonfinite_rows"] > 0


@losses
@impls
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_advantage_that_is_no_number_is_counted(op: str, impl: str, bad: float) -> None:
    given = make(op)
    given["advantages"] = torch.tensor([bad, 0.5])
    function = {"grpo_loss": grpo_loss, "linear_grpo_loss": linear_grpo_loss}[op]
    out = function(**given, impl=impl)
    assert not out.loss.isfinite()
    assert out.metrics["nonfinite_rows"] == ROWS // 2
    _, found = gradient(op, given, impl=impl)
    assert found.isfinite().all() and found[ROWS // 2 :].any() and not found[: ROWS // 2].any()


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """Views of the same values."""
    flat = torch.cat([tensor.new_zeros(1), tensor.flatten()])
    wide = torch.stack([tensor, tensor], -1)
    return {
        "transposed": tensor.t().contiguous().t(),
        "every other": wide.flatten(-2)[..., ::2],
        "odd address": flat[1:].view(tensor.shape),
        "rows apart": torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]],
    }


@operators
@impls
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64])
def test_memory_layouts(op: str, impl: str, dtype: torch.dtype) -> None:
    if impl == "cpu" and dtype == FP64:
        with pytest.raises(ValueError, match="float64"):
            call(op, make(op, dtype=dtype), impl=impl)
        return
    given, name = make(op, dtype=dtype), main_input(op)
    expected = gradient(op, given, impl=impl)
    for layout, view in layouts(given[name]).items():
        assert torch.equal(view, given[name])
        found = gradient(op, {**given, name: view}, impl=impl)
        # the reference hands strides on to torch, which may add up in another order
        spread = 1e-9 if dtype == FP64 else 0.0
        for ours, truth in zip(found, expected, strict=True):
            assert_close(ours, truth, rtol=spread, atol=spread, msg=layout)


@operators
@impls
def test_rows_that_share_memory(op: str, impl: str) -> None:
    given, name = make(op), main_input(op)
    shared = given[name][:1].expand(ROWS, -1)
    found = gradient(op, {**given, name: shared}, impl=impl)
    expected = gradient(op, {**given, name: shared.contiguous()}, impl=impl)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    one = given["targets"][:1].expand(ROWS)
    found = gradient(op, {**given, "targets": one}, impl=impl)
    expected = gradient(op, {**given, "targets": one.contiguous()}, impl=impl)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@losses
@impls
def test_side_inputs_of_any_layout_and_dtype(op: str, impl: str) -> None:
    given = make(op)
    old = -torch.rand(ROWS)
    mask = torch.arange(ROWS) % 2 == 0
    plain = {
        **given,
        "old_logprobs": old,
        "mask": mask,
        "importance_weights": torch.full((2,), 0.7),
    }
    odd = {
        **given,
        "old_logprobs": torch.stack([old, old], 1)[:, 0].double(),
        "mask": torch.stack([mask, mask], 1)[:, 0],
        "importance_weights": torch.tensor(0.7).expand(2),
        "advantages": torch.stack([given["advantages"]] * 2, 1)[:, 1].double(),
        "cu_seqlens": torch.stack([given["cu_seqlens"]] * 2, 1)[:, 1].long(),
        "targets": given["targets"].int(),
    }
    results = [gradient(op, inputs, impl=impl) for inputs in (plain, odd)]
    for ours, truth in zip(*results, strict=True):
        assert_close(ours, truth, rtol=1e-6, atol=1e-8)


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


@operators
@impls
def test_who_wants_a_gradient(op: str, impl: str) -> None:
    given, name = make(op), main_input(op)
    logprobs, scalar = call(op, given, impl=impl)
    assert not scalar.requires_grad
    leaf = given[name].requires_grad_()
    with torch.no_grad():
        silent, scalar = call(op, {**given, name: leaf}, impl=impl)
    assert not scalar.requires_grad and torch.equal(silent, logprobs)
    with torch.inference_mode():
        silent, _ = call(op, {**given, name: leaf}, impl=impl)
        assert torch.equal(silent, logprobs)


@operators
@pytest.mark.parametrize("impl", ["cpu"])
def test_second_derivatives_are_refused(op: str, impl: str) -> None:
    given, name = make(op), main_input(op)
    given[name].requires_grad_()
    _, scalar = call(op, given, impl=impl)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(scalar, given[name], create_graph=True)


@operators
def test_transforms_of_torch_func_are_refused(op: str) -> None:
    given, name = make(op), main_input(op)

    def scalar(rows: Tensor) -> Tensor:
        return call(op, given | {name: rows})[1]

    with pytest.raises(RuntimeError, match=rf"{op} does not run inside of torch.func"):
        torch.func.grad(scalar)(given[name])
    with pytest.raises(RuntimeError, match=rf"{op} does not run inside of torch.func"):
        torch.func.vmap(scalar)(given[name][None])


@operators
@impls
def test_autocast(op: str, impl: str) -> None:
    """A head multiplies in the narrow dtype, as a linear layer would; logits are what they are."""
    given, name = make(op), main_input(op)
    with torch.autocast("cpu", dtype=BF16):
        logprobs, found = gradient(op, given, impl=impl)
    narrow = {n: t.to(BF16) if n in ("hidden", "weight") else t for n, t in given.items()}
    expected, _ = gradient(op, narrow, impl=impl)
    assert logprobs.dtype == FP32 and torch.equal(logprobs, expected)
    assert found.dtype == given[name].dtype


@impls
def test_a_second_backward_pass(impl: str) -> None:
    for op in OPERATORS:
        given, name = make(op), main_input(op)
        given[name].requires_grad_()
        _, scalar = call(op, given, impl=impl)
        first, second = (
            torch.autograd.grad(scalar, given[name], retain_graph=True)[0] for _ in range(2)
        )
        assert torch.equal(first, second)


@pytest.mark.parametrize("impl", ["reference"])
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


@pytest.mark.slow
@impls
def test_more_than_two_to_the_31_logits(impl: str) -> None:
    """Rows past the reach of an int32, in a view that takes little memory."""
    rows, vocab = 2**15 + 3, 2**16
    held = torch.randn(vocab + rows, dtype=FP32).to(FP16)
    logits = held.as_strided((rows, vocab), (1, 1))
    targets = torch.zeros(rows, dtype=torch.long)
    picked = slice(rows - 8, rows)
    if impl == "reference":
        logits, targets = logits[picked], targets[picked]
    logprobs, _ = token_logprobs(logits, targets, impl=impl)
    exact = held.as_strided((8, vocab), (1, 1), rows - 8).double().log_softmax(-1)[:, 0]
    assert_close(logprobs[-8:].double(), exact, rtol=0, atol=1e-5)


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
