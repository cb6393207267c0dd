"""Operators of given logits in Triton's interpreter.

`test_triton_interpreter.py` runs this file.
"""

from __future__ import annotations

import pytest
import torch
from interpreter import interpret
from triton_cases import BF16, FP16, FP32, SPECS, rows_loss, upstream
from triton_checks import compare, logprobs_result, loss_result, make_batch, make_logits

from polymath_fast.kernels.faults import verify_targets
from polymath_fast.kernels.token_logprobs._triton import gradient as token_gradient
from polymath_fast.kernels.token_logprobs._triton import token_logprobs

interpret()

LOGITS = [
    pytest.param(1, 1000, BF16, id="one-row"),
    pytest.param(63, 1000, FP32, id="tail-only"),
    pytest.param(507, 1000, FP16, id="many-rows"),
    pytest.param(5, 49152, BF16, id="whole-tiles"),
    pytest.param(2, 151936, BF16, id="tiles-and-tail"),
]


@pytest.mark.parametrize(("count", "vocab", "dtype"), LOGITS)
def test_rows_logprobs(count, vocab, dtype) -> None:
    g, g_entropy = upstream(count)
    compare(
        lambda name, tensors: logprobs_result("token_logprobs", name, tensors, g, g_entropy),
        make_logits(count, vocab, dtype, "cpu"),
        dtype,
    )


def test_rows_gradient_of_the_logprobs_alone() -> None:
    g, _ = upstream(20)
    compare(
        lambda name, tensors: logprobs_result("token_logprobs", name, tensors, g, None),
        make_logits(20, 5000, BF16, "cpu"),
        BF16,
    )


@pytest.mark.parametrize(("spec", "names"), SPECS)
def test_rows_loss(spec, names) -> None:
    batch = make_batch(21, "cpu", *names)
    compare(
        lambda name, tensors: loss_result("grpo_loss", name, tensors, batch, spec),
        make_logits(21, 1000, BF16, "cpu"),
        BF16,
    )


def test_rows_hostile_values_stay_in_their_rows() -> None:
    tensors = make_logits(12, 700, FP32, "cpu")
    clean, targets = tensors["logits"], tensors["targets"]
    logits = clean.clone()
    logits[1, 5] = torch.nan
    logits[2, 6] = torch.inf
    logits[3] = -torch.inf
    logits[4, targets[4]] = -torch.inf
    logits[5, :600] = -torch.inf
    targets[5] = 650
    logits[6] = 1e4 * logits[6].sign()
    logits[7] = 3.0
    targets[8], targets[9], targets[10] = -1, 700, -100
    logits.requires_grad_()
    logprobs, entropy = token_logprobs(logits, targets, 1.0)
    (logprobs[:8].nan_to_num(0, 0, 0) + entropy[:8].nan_to_num()).sum().backward()
    bad = torch.tensor([1, 2, 3, 8, 9, 10])
    logprobs, entropy = logprobs.detach(), entropy.detach()
    assert logprobs[bad].isnan().all() and entropy[bad].isnan().all()
    assert logprobs[4] == -torch.inf and entropy[4].isfinite()
    good = torch.tensor([0, 5, 6, 7, 11])
    exact = logits.detach().double().log_softmax(-1)
    torch.testing.assert_close(
        logprobs[good].double(), exact[good, targets[good]], rtol=1e-6, atol=1e-5
    )
    assert entropy[7] == pytest.approx(torch.log(torch.tensor(700.0)).item(), abs=1e-5)
    assert logits.grad[[0, 5, 6, 7]].isfinite().all()
    assert (logits.grad[[1, 2, 3]] == 0).all()
    with pytest.raises(ValueError, match="outside"):
        verify_targets("cpu")


@pytest.mark.parametrize("layout", ["transposed", "expanded", "gaps", "odd-address"])
def test_rows_strides(layout) -> None:
    tensors = make_logits(6, 1000, BF16, "cpu")
    logits, targets = tensors["logits"], tensors["targets"]
    views = {
        "transposed": logits.T.contiguous().T,
        "expanded": logits[:1].expand(6, 1000),
        "gaps": torch.cat([logits, logits], 1)[:, :1000],
        "odd-address": torch.cat([logits.new_zeros(1), logits.flatten()])[1:].view(6, 1000),
    }
    view = views[layout].detach().requires_grad_()
    plain = view.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    for leaf in (view, plain):
        logprobs, entropy = token_logprobs(leaf, targets, 1.0)
        (logprobs + entropy).sum().backward()
    assert torch.equal(view.grad, plain.grad)


@pytest.mark.parametrize("layout", ["expanded", "gaps"])
def test_targets_strides(layout) -> None:
    tensors = make_logits(9, 300, BF16, "cpu")
    one = tensors["targets"][:1]
    views = {
        "expanded": one.expand(9),  # the kernel would read past a single number
        "gaps": torch.stack([tensors["targets"], torch.zeros(9, dtype=torch.int64)], 1)[:, 0],
    }
    found = []
    for targets in (views[layout], views[layout].contiguous()):
        for inplace in (False, True):  # with the loss's coefficients known beforehand
            leaf = tensors["logits"].detach().clone().requires_grad_()
            logprobs, _ = token_logprobs(leaf, targets, 1.0)
            logprobs.sum().backward()
            found.append([logprobs.detach(), leaf.grad])
            leaf.grad = None
            out = rows_loss(leaf * 1, targets, inplace=inplace)
            out.loss.backward()
            found[-1] += [out.logprobs.detach(), leaf.grad]
    for kept in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(kept, found[0], strict=True))


def test_inplace_overwrites_and_says_so() -> None:
    tensors = make_logits(6, 1000, FP32, "cpu")
    truth = tensors["logits"].clone().requires_grad_()
    rows_loss(truth, tensors["targets"]).loss.backward()
    leaf = tensors["logits"].clone().requires_grad_()
    logits = leaf * 1
    squares = logits.square()
    out = rows_loss(logits, tensors["targets"], inplace=True)
    out.loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, truth.grad) and torch.equal(logits, truth.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.sum().backward()
    with pytest.raises(RuntimeError, match="used up"):
        out.loss.backward()


def test_inplace_never_writes_over_a_leaf() -> None:
    tensors = make_logits(6, 1000, FP32, "cpu")
    leaf = tensors["logits"].clone().requires_grad_()
    rows_loss(leaf, tensors["targets"], inplace=True).loss.backward()
    assert torch.equal(leaf.detach(), tensors["logits"])


def test_rows_gradient_starts_from_the_logits_again() -> None:
    """As graphs of torch.compile need it: the bits of a plain call's backward pass."""
    tensors = make_logits(21, 1000, BF16, "cpu")
    leaf, (g, g_entropy) = tensors["logits"].requires_grad_(), upstream(21)
    for by_entropy in (None, g_entropy):
        logprobs, entropy = token_logprobs(leaf, tensors["targets"], 0.7)
        outputs = ((logprobs, entropy), (g, by_entropy))
        if by_entropy is None:
            outputs = (logprobs, g)
        (expected,) = torch.autograd.grad(outputs[0], leaf, outputs[1])
        again = token_gradient(leaf.detach(), tensors["targets"], 0.7, g, by_entropy)
        assert torch.equal(again, expected)
