"""Log-probs of an LM head and their gradients in Triton's interpreter.

`test_triton_interpreter.py` runs this file.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from closeness import relative_error
from interpreter import interpret
from triton_cases import BF16, FP16, FP32, upstream
from triton_checks import compare, logprobs_result, make_head

from polymath_fast.kernels.linear_logprobs._triton import gradients as head_gradients
from polymath_fast.kernels.linear_logprobs._triton import linear_logprobs
from polymath_fast.kernels.triton import head

interpret()

HEADS = [
    pytest.param(1, 1000, 48, BF16, False, id="one-row"),
    pytest.param(63, 1000, 47, BF16, True, id="odd-depth"),
    pytest.param(130, 1000, 64, BF16, False, id="many-rows"),
    pytest.param(21, 1000, 48, FP16, True, id="half"),
    pytest.param(21, 1000, 48, FP32, False, id="single"),
    pytest.param(20, 49152, 32, BF16, False, id="many-tiles"),
    pytest.param(1, 151936, 16, BF16, False, id="large-vocabulary"),
]


@pytest.mark.parametrize(("count", "vocab", "depth", "dtype", "bias"), HEADS)
def test_head_logprobs(count, vocab, depth, dtype, bias) -> None:
    g, g_entropy = upstream(count)
    compare(
        lambda name, tensors: logprobs_result("linear_logprobs", name, tensors, g, g_entropy),
        make_head(count, vocab, depth, dtype, "cpu", bias),
        dtype,
    )


def test_head_logprobs_without_gradient() -> None:
    tensors = make_head(507, 1000, 64, BF16, "cpu")
    given = (tensors["hidden"], tensors["weight"], tensors["targets"])
    logprobs, entropy = linear_logprobs(*given, None, 1.0)
    exact = (given[0].double() @ given[1].double().T).log_softmax(-1)
    chosen = exact.gather(-1, given[2][:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), chosen, rtol=1e-6, atol=1e-5)
    truth = -(exact.exp() * exact).sum(-1)
    torch.testing.assert_close(entropy.double(), truth, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("within", [torch.no_grad, torch.enable_grad])
def test_exponentials_are_kept_only_for_a_gradient(within, monkeypatch) -> None:
    """A policy's weights require one also where its log-probs alone are asked for."""
    made, release = [], head.Head.release
    monkeypatch.setattr(head.Head, "release", lambda self: made.append(self) or release(self))
    tensors = make_head(37, 1000, 48, BF16, "cpu")
    weight = tensors["weight"].requires_grad_()
    with within():
        logprobs, _ = linear_logprobs(tensors["hidden"], weight, tensors["targets"], None, 1.0)
    assert len(made) == (not logprobs.requires_grad) == (within is torch.no_grad)


def test_head_logprobs_recomputed_in_chunks(monkeypatch) -> None:
    monkeypatch.setattr(head.Head, "_rows_that_fit", lambda self: 16)
    g, g_entropy = upstream(37)
    g[5:30] = 0
    compare(
        lambda name, tensors: logprobs_result("linear_logprobs", name, tensors, g, g_entropy * g),
        make_head(37, 1000, 48, BF16, "cpu"),
        BF16,
    )


def test_head_rows_whose_target_is_all_but_impossible() -> None:
    tensors = make_head(20, 300, 32, BF16, "cpu")
    tensors["hidden"][::3] *= 40
    g, g_entropy = upstream(20)
    ours = logprobs_result("linear_logprobs", "_triton", tensors, g, g_entropy)
    exact = {n: None if t is None else t.double() for n, t in tensors.items()}
    exact["targets"] = tensors["targets"]
    truth = logprobs_result("linear_logprobs", "reference", exact, g, g_entropy)
    assert truth.logprobs.min() < -200
    torch.testing.assert_close(ours.logprobs.double(), truth.logprobs, rtol=1e-5, atol=1e-4)
    for name in ("hidden", "weight"):
        assert relative_error(ours.gradients[name], truth.gradients[name]) < 1e-2


@pytest.mark.parametrize("keep", [True, False], ids=["stored", "sums-alone"])
def test_a_persistent_product_has_the_same_bits(keep) -> None:
    """Its programs take several tiles each, more than four in all here, and the last ones fewer."""
    tensors = make_head(130, 3000, 47, BF16, "cpu", bias=True)
    given = [tensors[name] for name in ("hidden", "weight", "bias", "targets")]
    index = torch.arange(130)
    live = torch.tensor([130], dtype=torch.int32) if keep else None
    found = []
    for persistent in (False, True):
        one = head.Head(*given, 0.7)
        one.tiles = replace(one.tiles, persistent=persistent)
        chunk = one.chunk(index, slice(0, 130), live)
        found.append((chunk.found, chunk.exps if keep else chunk.found))
    assert found[0][0].isfinite().all()
    for plain, ours in zip(*found, strict=True):
        assert torch.equal(plain, ours)


@pytest.mark.parametrize("chunk", [16, 64], ids=["chunks", "one-chunk"])
def test_head_gradients_start_from_the_inputs_again(chunk, monkeypatch) -> None:
    monkeypatch.setattr(head.Head, "_rows_that_fit", lambda self: chunk)
    tensors = make_head(37, 1000, 48, BF16, "cpu", bias=True)
    g, g_entropy = upstream(37)
    g[::3] = g_entropy[::3] = 0
    leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    hidden, weight, bias = leaves
    outputs = linear_logprobs(hidden, weight, tensors["targets"], bias, 0.7)
    expected = torch.autograd.grad(outputs, leaves, (g, g_entropy))
    hidden, weight, bias = (leaf.detach() for leaf in leaves)
    given = (hidden, weight, tensors["targets"], bias, 0.7, g, g_entropy)
    everything = head_gradients(*given, (True, True, True))
    for again, exact in zip(everything, expected, strict=True):
        assert torch.equal(again, exact)
    only = head_gradients(*given, (False, True, False))
    assert only[0] is only[2] is None and torch.equal(only[1], expected[1])
