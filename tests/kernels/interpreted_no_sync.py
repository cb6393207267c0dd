"""Triton kernels whose host waits for nothing, in Triton's interpreter.

`test_triton_interpreter.py` runs this file.
"""

from __future__ import annotations

import pytest
import torch
from interpreter import interpret
from no_sync import NoSync, outside
from triton_cases import BF16, FP16, FP32, prepared_batch
from triton_checks import make_batch, make_head, make_logits

from polymath_fast.kernels.grpo_loss._triton import grpo_loss
from polymath_fast.kernels.linear_grpo_loss._triton import linear_grpo_loss
from polymath_fast.kernels.linear_logprobs._triton import linear_logprobs
from polymath_fast.kernels.policy_loss import PolicyLossSpec, prepare
from polymath_fast.kernels.token_logprobs._triton import token_logprobs
from polymath_fast.kernels.triton import head, head_gradient
from polymath_fast.kernels.triton.coefficients import known_beforehand

interpret()


NOTHING_WAITS = [
    pytest.param(PolicyLossSpec(), 0.0, BF16, id="on-policy"),
    pytest.param(PolicyLossSpec(loss_type="gspo", entropy_coef=0.1), 0.0, BF16, id="two-passes"),
    pytest.param(PolicyLossSpec(top_entropy_quantile=0.5), 0.0, FP16, id="quantile"),
    pytest.param(PolicyLossSpec(), "auto", BF16, id="auto"),
    pytest.param(PolicyLossSpec(loss_type="sapo"), 1e-3, BF16, id="number"),
    pytest.param(PolicyLossSpec(loss_type="sapo"), "auto", FP32, id="single"),
]


@pytest.fixture
def launches_unseen(monkeypatch):
    """The interpreter copies what it is given."""
    kernels = type(head_gradient.scaled_rows_kernel)
    launcher = kernels.__getitem__
    monkeypatch.setattr(kernels, "__getitem__", lambda self, grid: outside(launcher(self, grid)))


@pytest.mark.parametrize(("spec", "tol", "dtype"), NOTHING_WAITS)
def test_the_host_waits_for_nothing(spec, tol, dtype, monkeypatch, launches_unseen) -> None:
    """Neither forward nor backward fetches a number, with rows and columns left out on the way."""
    monkeypatch.setattr(head.Head, "_rows_that_fit", lambda self: 32)
    tensors = make_head(45, 600, 32, dtype, "cpu", bias=True)
    tensors["bias"][30:] -= 12.0
    tensors["targets"] %= 30
    names = ("old_logprobs",) if spec.loss_type == "gspo" else ()
    given = make_batch(45, "cpu", *names)
    batch = prepare(spec, 45, FP32, torch.device("cpu"), **given)
    known_beforehand(batch, spec)  # looks at a new spec once, on the CPU
    inputs = [tensors[n].requires_grad_() for n in ("hidden", "weight", "bias")]
    with NoSync():
        arguments = (inputs[0], inputs[1], tensors["targets"], inputs[2], batch, spec, tol)
        out = linear_grpo_loss(*arguments)
        out.loss.backward()
        logprobs, entropy = linear_logprobs(*arguments[:4], 1.0)
        (logprobs + entropy).sum().backward()
    assert all(t.grad.isfinite().all() and t.grad.any() for t in inputs)


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_rows_wait_for_nothing(loss_type, launches_unseen) -> None:
    spec = PolicyLossSpec(loss_type=loss_type)
    tensors = make_logits(12, 700, BF16, "cpu")
    logits = tensors["logits"].requires_grad_()
    batch = prepared_batch(12, spec)
    known_beforehand(batch, spec)
    with NoSync():
        grpo_loss(logits, tensors["targets"], batch, spec, False).loss.backward()
        logprobs, entropy = token_logprobs(logits, tensors["targets"], 1.0)
        (logprobs + entropy).sum().backward()
    assert logits.grad.isfinite().all()
