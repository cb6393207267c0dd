"""The loss that reads an LM head in Triton's interpreter.

`test_triton_interpreter.py` runs this file.
"""

from __future__ import annotations

import pytest
import torch
from closeness import relative_error
from interpreter import interpret
from triton_cases import BF16, FP16, SPECS, head_loss, prepared_batch
from triton_checks import ROUNDING, compare, loss_result, make_batch, make_head

from polymath_fast.kernels.faults import verify_targets
from polymath_fast.kernels.linear_grpo_loss._triton import linear_grpo_loss
from polymath_fast.kernels.policy_loss import PolicyLossSpec
from polymath_fast.kernels.triton import head, head_gradient

interpret()


@pytest.mark.parametrize(("spec", "names"), SPECS)
def test_head_loss(spec, names, monkeypatch) -> None:
    monkeypatch.setattr(head.Head, "_rows_that_fit", lambda self: 16)
    batch = make_batch(37, "cpu", *names)
    compare(
        lambda name, tensors: loss_result("linear_grpo_loss", name, tensors, batch, spec),
        make_head(37, 1000, 48, BF16, "cpu", bias=True),
        BF16,
    )


def test_head_loss_with_multiplicity() -> None:
    times = {"multiplicity": torch.tensor([2.0, 1.0, 3.0, 1.0])}
    compare(
        lambda name, tensors: loss_result(
            "linear_grpo_loss", name, tensors, make_batch(21, "cpu") | times, PolicyLossSpec()
        ),
        make_head(21, 1000, 48, BF16, "cpu"),
        BF16,
    )


def test_head_loss_of_one_chunk() -> None:
    batch = make_batch(63, "cpu", "old_logprobs")
    spec = PolicyLossSpec(loss_type="cispo", epsilon_high=5.0)
    compare(
        lambda name, tensors: loss_result("linear_grpo_loss", name, tensors, batch, spec),
        make_head(63, 1000, 48, BF16, "cpu"),
        BF16,
    )


@pytest.mark.parametrize(("tol", "peaked"), [(1e-3, True), ("auto", True), ("auto", False)])
def test_vocabulary_columns_left_out(tol, peaked, monkeypatch) -> None:
    monkeypatch.setattr(head.Head, "_rows_that_fit", lambda self: 32)
    tensors = make_head(48, 900, 32, FP16, "cpu", bias=True)
    targets = tensors["targets"] = tensors["targets"] % 40
    tensors["bias"][40:] -= 14.0 if peaked else -2.0
    tensors["hidden"] *= 0.5
    batch = make_batch(48, "cpu")
    batch["advantages"][3] = 0.4
    spec = PolicyLossSpec(entropy_coef=0.01)
    exact, some = (
        loss_result("linear_grpo_loss", "_triton", tensors, batch, spec, t) for t in (0.0, tol)
    )
    metrics = some.output.metrics
    share, bound = metrics["vocab/live_share"], metrics["vocab/error_bound"]
    if peaked:
        assert share < 0.5 and 0 < metrics["vocab/dropped_mass"] < 0.01
        zero = (some.gradients["weight"] == 0).all(1).float().mean().item()
        assert zero == pytest.approx(1 - share.item(), abs=0.15)
    elif tol == "auto":
        assert share == 1 and bound == 0
    errors = [
        relative_error(some.gradients[name], exact.gradients[name]) for name in ("hidden", "weight")
    ]
    assert max(errors) <= bound + 2 * ROUNDING[FP16]
    assert tol != "auto" or bound <= 2.6e-3
    torch.testing.assert_close(some.gradients["bias"], exact.gradients["bias"])
    assert torch.equal(some.logprobs, exact.logprobs)
    assert (some.gradients["weight"][targets.unique()] != 0).any()


@pytest.mark.parametrize("train", [(True, False), (False, True)], ids=["hidden", "weight"])
def test_head_gradient_of_one_input_only(train) -> None:
    tensors = make_head(20, 300, 32, BF16, "cpu")
    hidden, weight, targets = tensors["hidden"], tensors["weight"], tensors["targets"]
    both = [t.clone().requires_grad_() for t in (hidden, weight)]
    some = [t.clone().requires_grad_(r) for t, r in zip((hidden, weight), train, strict=True)]
    for leaves in (both, some):
        head_loss(*leaves, targets).loss.backward()
    for wanted, ours, truth in zip(train, some, both, strict=True):
        assert torch.equal(ours.grad, truth.grad) if wanted else ours.grad is None


def test_head_hostile_values_stay_in_their_rows() -> None:
    tensors = make_head(12, 300, 32, BF16, "cpu")
    hidden, weight, targets = tensors["hidden"], tensors["weight"], tensors["targets"]
    kept = torch.tensor([0, 4, 5, 6, 7, 8, 11])
    alone = [hidden[kept].requires_grad_(), weight.clone().requires_grad_()]
    truth = head_loss(*alone, targets[kept], normalizer=12.0)
    truth.loss.backward()
    hidden[1, 3], hidden[2, 0], hidden[3] = torch.nan, torch.inf, -torch.inf
    targets[9], targets[10] = -1, 300
    leaves = [hidden.requires_grad_(), weight.clone().requires_grad_()]
    out = head_loss(*leaves, targets, normalizer=12.0)
    out.loss.backward()
    assert out.logprobs[[1, 2, 3, 9, 10]].isnan().all()
    assert out.metrics["nonfinite_rows"] == 5
    torch.testing.assert_close(out.logprobs[kept], truth.logprobs)
    torch.testing.assert_close(leaves[0].grad[kept], alone[0].grad)
    torch.testing.assert_close(leaves[1].grad, alone[1].grad)
    assert (leaves[0].grad[[1, 2, 3, 9, 10]] == 0).all()
    with pytest.raises(ValueError, match="outside"):
        verify_targets("cpu")


@pytest.mark.parametrize("far", [-200.0, torch.nan])
def test_masked_tokens_enter_no_product(far) -> None:
    tensors = make_head(30, 300, 32, BF16, "cpu")
    mask = torch.arange(30) % 3 != 0
    spec, results = PolicyLossSpec(), []
    for value in (-2.0, far):
        old = torch.where(mask, -2.0, value)
        given = prepared_batch(30, spec, mask, old_logprobs=old)
        leaves = [tensors[n].detach().requires_grad_() for n in ("hidden", "weight")]
        linear_grpo_loss(*leaves, tensors["targets"], None, given, spec, 0.0).loss.backward()
        results.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*results, strict=True))


def test_two_runs_are_bit_equal() -> None:
    runs = []
    for _ in range(2):
        tensors = make_head(63, 1000, 48, BF16, "cpu")
        leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight")]
        out = head_loss(*leaves, tensors["targets"])
        out.loss.backward()
        runs.append([out.loss.detach(), out.logprobs, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_rows_without_gradient_are_left_out_of_the_products(monkeypatch) -> None:
    tensors = make_head(60, 300, 32, BF16, "cpu")
    mask = torch.zeros(60, dtype=torch.bool)
    mask[::4] = True
    seen = []
    monkeypatch.setattr(head.Head, "_rows_that_fit", lambda self: 32)
    add = head_gradient.HeadGradient.add
    monkeypatch.setattr(
        head_gradient.HeadGradient,
        "add",
        lambda self, chunk, *rest: (seen.append(int(chunk.live)), add(self, chunk, *rest)),
    )
    leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight")]
    out = head_loss(*leaves, tensors["targets"], mask=mask)
    out.loss.backward()
    assert seen == [15, 0]
    assert out.logprobs.isfinite().all()
    assert (leaves[0].grad[~mask] == 0).all() and (leaves[0].grad[mask] != 0).any(1).all()
