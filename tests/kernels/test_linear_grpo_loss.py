"""The loss from the LM head on every CPU path: accuracy, gradients, parts that add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from closeness import relative_error
from head_losses import BF16, FP16, FP32, SPECS, loss_inputs, run
from heads import Head, make_head, plain_logprobs, plain_loss
from torch.testing import assert_close

from polymath_fast.kernels import PolicyLossSpec, linear_grpo_loss
from polymath_fast.kernels.cpu import head as head_module
from polymath_fast.kernels.cpu import head_gradient, products


@pytest.fixture(params=["tiles", "torch"])
def cpu_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way of multiplying bf16 matrices, whatever this processor would choose."""
    monkeypatch.setattr(products.tiles, "available", lambda dtype: request.param == "tiles")
    return request.param


SHAPES = [
    pytest.param(63, 33, 1000, id="odd H, rows and V off the tiles"),
    pytest.param(130, 64, 1001, id="odd V, more than one block"),
    pytest.param(7, 48, 96, id="fewer rows than a tile, whole panels"),
    pytest.param(1, 2, 2, id="smallest"),
]


@pytest.mark.parametrize(("rows", "size", "vocab"), SHAPES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_bf16_beats_plain_pytorch(
    rows: int, size: int, vocab: int, spec: PolicyLossSpec, cpu_path: str
) -> None:
    head = make_head(rows, size, vocab, bias=True)
    inputs = loss_inputs(head, spec)
    truth, gradients = plain_loss(head, torch.float64, spec, **inputs)
    _, plain = plain_loss(head, BF16, spec, **inputs)
    out, ours = run(head, spec, inputs)
    assert_close(out.loss.detach().double(), truth, rtol=2e-5, atol=1e-6)
    exact = [None if t is None else t.double() for t in (head.hidden, head.weight, head.bias)]
    logprobs, entropy = plain_logprobs(*exact, head.targets, spec.temperature)
    assert (out.logprobs - logprobs).abs().max() < 1e-5
    assert (out.entropy - entropy).abs().max() < 1e-5
    for got, same_dtype, true in zip(ours, plain, gradients, strict=True):
        assert got.dtype == BF16
        assert relative_error(got, true) <= 1.05 * relative_error(same_dtype, true) + 1e-3


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_wider_dtypes(dtype: torch.dtype, impl: str) -> None:
    head = make_head(63, 33, 1000, dtype, bias=True)
    spec = SPECS["everything"]
    inputs = loss_inputs(head, spec)
    truth, gradients = plain_loss(head, torch.float64, spec, **inputs)
    out, ours = run(head, spec, inputs, impl=impl)
    assert_close(out.loss.detach().double(), truth, rtol=2e-5, atol=1e-6)
    for got, true in zip(ours, gradients, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, true) < (1e-5 if dtype == FP32 else 1e-3)


def test_fp64_runs_the_reference_exactly() -> None:
    head = make_head(20, 8, 50, torch.float64, bias=True)
    spec = SPECS["everything"]
    inputs = loss_inputs(head, spec)
    truth, gradients = plain_loss(head, torch.float64, spec, **inputs)
    out, ours = run(head, spec, inputs)
    assert_close(out.loss.detach(), truth, rtol=1e-12, atol=1e-12)
    for got, true in zip(ours, gradients, strict=True):
        assert_close(got, true, rtol=1e-10, atol=1e-12)


def test_logprobs_at_logits_of_thirty(cpu_path: str) -> None:
    head = make_head(256, 576, 4096, spread=6.5)
    exact = head.hidden.double() @ head.weight.double().T
    assert 28 < exact.abs().max() < 36
    out = linear_grpo_loss(
        head.hidden,
        head.weight,
        head.targets,
        torch.ones(1),
        torch.tensor([0, 256], dtype=torch.int32),
    )
    truth = exact.log_softmax(-1).gather(-1, head.targets[:, None])[:, 0]
    assert (out.logprobs - truth).abs().max() < 1e-5
    assert (out.logprobs <= 0).all()


@pytest.mark.parametrize("spec", [PolicyLossSpec(loss_type="grpo"), SPECS["clip_cov"]])
def test_chunks_and_dead_rows_change_nothing(
    spec: PolicyLossSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = make_head(200, 32, 500)
    inputs = loss_inputs(head, completions=6)
    inputs["advantages"][::2] = 0  # whole completions without a gradient
    out, whole = run(head, spec, inputs)
    monkeypatch.setattr(head_module, "LOGITS_BYTES", 1)
    monkeypatch.setattr(head_gradient, "SLOPES_BYTES", 1)
    small, parts = run(head, spec, inputs)
    assert torch.equal(out.logprobs, small.logprobs)
    assert torch.equal(whole[0], parts[0])
    assert_close(whole[1], parts[1], rtol=1e-2, atol=1e-6)  # sums in another order, then bf16
    dead = (
        inputs["advantages"][
            torch.searchsorted(inputs["cu_seqlens"][1:].long(), torch.arange(200), right=True)
        ]
        == 0
    )
    assert dead.any()
    assert not whole[0][dead].any()


def test_two_runs_are_bit_equal_for_any_number_of_threads() -> None:
    head = make_head(130, 64, 1001, bias=True)
    spec = SPECS["everything"]
    inputs = loss_inputs(head, spec)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 3):
            torch.set_num_threads(threads)
            out, gradients = run(head, spec, inputs)
            results.append([out.loss.detach(), out.logprobs, out.entropy, *gradients])
    finally:
        torch.set_num_threads(before)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_micro_batches_add_up_to_one_batch() -> None:
    head = make_head(60, 32, 300, FP32)
    offsets = torch.tensor([0, 10, 25, 40, 60], dtype=torch.int32)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    spec = PolicyLossSpec(
        loss_type="grpo", normalizer=4.0, entropy_coef=0.1, entropy_normalizer=60.0
    )
    _, whole = run(head, spec, {"advantages": advantages, "cu_seqlens": offsets})
    leaves = head.leaves()
    for first, last in ((0, 1), (1, 4)):
        some = slice(offsets[first], offsets[last])
        linear_grpo_loss(
            leaves[0][some],
            leaves[1],
            head.targets[some],
            advantages[first:last],
            offsets[first : last + 1] - offsets[first],
            spec=spec,
        ).loss.backward()
    for parts, expected in zip(leaves, whole, strict=False):
        assert_close(parts.grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_a_sink_takes_the_weight_s_gradient(loss_type: str) -> None:
    """Whatever the loss is multiplied by, and when two passes forward precede the backward ones."""
    head = make_head(60, 32, 300, FP32)
    inputs = {
        "advantages": torch.tensor([1.0, -1.0]),
        "cu_seqlens": torch.tensor([0, 20, 60], dtype=torch.int32),
    }
    spec = PolicyLossSpec(loss_type=loss_type)
    _, (_, expected, *_) = run(head, spec, inputs)
    total, calls = torch.full((300, 32), torch.nan), []

    def sink() -> tuple[torch.Tensor, bool]:
        calls.append(1)
        return total, len(calls) > 1

    hidden, weight, _ = head.leaves()
    weight.gradient_sink = sink
    losses = [
        linear_grpo_loss(hidden * sign, weight, head.targets, **inputs, spec=spec).loss
        for sign in (1.0, -1.0)
    ]
    _, (_, mirrored, *_) = run(replace(head, hidden=-head.hidden), spec, inputs)
    (3.0 * losses[0]).backward()
    assert_close(total, 3.0 * expected, rtol=1e-4, atol=1e-7)
    losses[1].backward()
    assert_close(total, 3.0 * expected + mirrored, rtol=1e-4, atol=1e-6)
    assert weight.grad is None


MULTIPLIED = [
    PolicyLossSpec(loss_type="dapo", entropy_coef=0.02, beta=0.1),
    PolicyLossSpec(loss_type="gspo", normalizer=9.0),
]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("spec", MULTIPLIED, ids=["dapo", "gspo"])
def test_multiplicity_stands_for_copies(spec: PolicyLossSpec, impl: str) -> None:
    head = make_head(20, 16, 50, FP32)
    inputs = loss_inputs(head, spec)
    times = torch.tensor([2, 1, 3, 1, 2])[: len(inputs["advantages"])]
    out, gradients = run(head, spec, inputs | {"multiplicity": times.float()}, impl=impl)
    bounds = inputs["cu_seqlens"].tolist()
    order = torch.tensor([b for b, n in enumerate(times.tolist()) for _ in range(n)])
    spans = [torch.arange(bounds[b], bounds[b + 1]) for b in order.tolist()]
    rows = torch.cat(spans)
    copies = Head(head.hidden[rows], head.weight, None, head.targets[rows])
    repeated = {
        name: value[rows] if len(value) == len(head.targets) else value[order]
        for name, value in inputs.items()
        if name != "cu_seqlens"
    }
    lengths = torch.tensor([0, *map(len, spans)])
    truth, exact = run(copies, spec, repeated | {"cu_seqlens": lengths.cumsum(0).int()}, impl=impl)
    assert_close(out.loss, truth.loss, rtol=1e-5, atol=1e-7)
    summed = torch.zeros_like(head.hidden).index_add_(0, rows, exact[0])
    assert relative_error(gradients[0], summed.double()) < 1e-5
    assert relative_error(gradients[1], exact[1].double()) < 1e-5
    for name, value in truth.metrics.items():
        assert_close(out.metrics[name].float(), value.float(), rtol=1e-5, atol=1e-6, msg=name)
