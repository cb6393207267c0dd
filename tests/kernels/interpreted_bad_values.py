"""What no Triton kernel can take, and nothing at all, in Triton's interpreter.

`test_triton_interpreter.py` runs this file.
"""

from __future__ import annotations

import pytest
import torch
from interpreter import interpret
from triton_cases import BF16, FP32, SPECS, head_loss, rows_loss
from triton_checks import loss_result, make_batch, make_head, make_logits

from polymath_fast.kernels.faults import verify_targets
from polymath_fast.kernels.linear_logprobs._triton import linear_logprobs
from polymath_fast.kernels.policy_loss import input_checks
from polymath_fast.kernels.token_logprobs._triton import token_logprobs
from polymath_fast.kernels.triton import head, offsets

interpret()


def test_nothing_at_all() -> None:
    logits = torch.randn(0, 1000, dtype=BF16, requires_grad=True)
    hidden = torch.randn(0, 32, dtype=BF16, requires_grad=True)
    weight = torch.randn(1000, 32, dtype=BF16, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.long)
    for out in (rows_loss(logits, targets), head_loss(hidden, weight, targets)):
        assert out.loss == 0 and out.logprobs.shape == out.entropy.shape == (0,)
        out.loss.backward()
    (token_logprobs(logits, targets, 1.0)[0].sum()).backward()
    (linear_logprobs(hidden, weight, targets, None, 1.0)[0].sum()).backward()
    assert logits.grad.shape == (0, 1000) and hidden.grad.shape == (0, 32)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("label", [-100, 300, 2**40])
@pytest.mark.parametrize("op", ["token_logprobs", "grpo_loss", "linear_grpo_loss", "of-fp32"])
def test_targets_outside_are_told_to_the_host(op, label, monkeypatch) -> None:
    """Under the row's own number, also where rows were put in another order; once."""
    monkeypatch.setattr(head.Head, "_rows_that_fit", lambda self: 8)
    tensors = make_head(20, 300, 32, FP32 if op == "of-fp32" else BF16, "cpu")
    logits = make_logits(20, 300, BF16, "cpu")["logits"].requires_grad_()
    hidden, weight = (tensors[name].requires_grad_() for name in ("hidden", "weight"))
    targets = tensors["targets"]
    targets[13] = label
    if op == "token_logprobs":
        token_logprobs(logits, targets, 1.0)
    elif op == "grpo_loss":
        rows_loss(logits, targets)
    else:
        head_loss(hidden, weight, targets, mask=torch.arange(20) % 3 != 0)
    shown = max(min(label, 2**31 - 1), -(2**31))
    with pytest.raises(ValueError, match=rf"targets\[13\] was {shown} .*outside \[0, 300\)"):
        verify_targets("cpu")
    verify_targets("cpu")


@pytest.mark.parametrize("op", ["token_logprobs", "linear_logprobs", "grpo_loss", "linear"])
def test_second_derivatives_are_refused(op) -> None:
    tensors = make_head(8, 300, 32, BF16, "cpu")
    logits = make_logits(8, 300, BF16, "cpu")["logits"].requires_grad_()
    hidden, weight = (tensors[name].requires_grad_() for name in ("hidden", "weight"))
    targets = tensors["targets"]
    scalar = {
        "token_logprobs": lambda: token_logprobs(logits, targets, 1.0)[0].sum(),
        "linear_logprobs": lambda: linear_logprobs(hidden, weight, targets, None, 1.0)[0].sum(),
        "grpo_loss": lambda: rows_loss(logits, targets).loss,
        "linear": lambda: head_loss(hidden, weight, targets).loss,
    }[op]()
    leaf = logits if op in ("token_logprobs", "grpo_loss") else hidden
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(scalar, leaf, create_graph=True)


BAD_OFFSETS = [
    pytest.param([2, 9, 20], r"cu_seqlens\[0\] was 2 ", id="start"),
    pytest.param([0, 9, 7, 20], r"cu_seqlens\[2\] was 7 ", id="fall"),
    pytest.param([0, 9, 19], r"cu_seqlens\[2\] was 19 ", id="short"),
    pytest.param([0, 30, 20], r"cu_seqlens\[2\] was 20 ", id="beyond"),
    pytest.param([0, -5, 20], r"cu_seqlens\[1\] was -5 ", id="negative"),
    pytest.param([0, 2**40], r"cu_seqlens\[1\] was 2147483647 ", id="huge"),
    pytest.param([0, *range(1500), 1400, 20], r"cu_seqlens\[1501\] was 1400 ", id="second-block"),
]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("cuts", [[0, 20], [0, 0, 7, 7, 20], [*[0] * 2000, 20]], ids=len)
def test_offsets_that_fit_come_through(dtype, cuts) -> None:
    given = torch.tensor(cuts, dtype=dtype)
    # a slice is contiguous and not aligned; every other one is neither
    spread = given.repeat_interleave(2)
    for view in (given, torch.cat([given[:1], given])[1:], spread[::2]):
        safe, sound = offsets.checked_offsets(view, 20)
        assert safe.dtype == torch.int64 and safe.tolist() == cuts and sound == 1
    verify_targets("cpu")


@pytest.mark.parametrize(("cuts", "message"), BAD_OFFSETS)
def test_offsets_that_do_not_fit_are_told_to_the_host(cuts, message) -> None:
    given = torch.tensor(cuts, dtype=torch.int64)
    safe, sound = offsets.checked_offsets(given, 20)
    assert safe.tolist() == [0] + [20] * (len(cuts) - 1) and sound.isnan()
    with pytest.raises(ValueError, match=message + ".*from 0 to the 20 tokens"):
        verify_targets("cpu")
    verify_targets("cpu")


def test_offsets_of_no_tokens() -> None:
    for cuts in ([0], [0, 0, 0]):
        safe, sound = offsets.checked_offsets(torch.tensor(cuts, dtype=torch.int32), 0)
        assert safe.tolist() == cuts and sound == 1
    safe, sound = offsets.checked_offsets(torch.tensor([3]), 0)
    assert safe.tolist() == [0] and sound.isnan()
    with pytest.raises(ValueError, match="was 3"):
        verify_targets("cpu")


@pytest.mark.parametrize(("spec", "names"), SPECS[:4])
@pytest.mark.parametrize("op", ["grpo_loss", "linear_grpo_loss"])
def test_bad_offsets_have_no_gradient(op, spec, names, monkeypatch) -> None:
    """The loss is NaN, all gradients are 0, nothing reads outside its memory."""
    shape = (21, 100) if op == "grpo_loss" else (21, 100, 32)
    tensors = (make_logits if op == "grpo_loss" else make_head)(*shape, BF16, "cpu")
    given = make_batch(21, "cpu", *names)
    # what is asked of the table of losses once, with offsets of its own on the CPU, is then known
    loss_result(op, "_triton", tensors, given, spec)
    monkeypatch.setattr(input_checks, "_looked_at_later", lambda device: True)
    bad = given | {"cu_seqlens": torch.tensor([0, 7, 7, 50, 40], dtype=torch.int32)}
    result = loss_result(op, "_triton", tensors, bad, spec)
    assert result.output.loss.isnan() and result.logprobs.isfinite().all()
    assert result.output.metrics["nonfinite_rows"] == given["mask"].sum()
    for gradient in result.gradients.values():
        assert gradient is None or (gradient == 0).all()
    with pytest.raises(ValueError, match=r"cu_seqlens\[4\] was 40 "):
        loss_result(op, "_triton", tensors, given, spec)
    assert loss_result(op, "_triton", tensors, given, spec).output.loss.isfinite()
