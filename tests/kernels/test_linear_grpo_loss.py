"""The loss from the LM head: accuracy, gradients, awkward shapes, bad input, on every CPU path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from closeness import relative_error
from heads import Head, make_head, plain_logprobs, plain_loss
from torch import Tensor
from torch.testing import assert_close

from polymath_fast.kernels import PolicyLossSpec, linear_grpo_loss
from polymath_fast.kernels.cpu import head as head_module
from polymath_fast.kernels.cpu import head_gradient, products

PLAIN = PolicyLossSpec()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(params=["tiles", "torch", "matrix unit"])
def cpu_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way of multiplying bf16 matrices, whatever this processor would choose."""
    monkeypatch.setattr(products.tiles, "available", lambda dtype: request.param == "tiles")
    monkeypatch.setattr(products, "_has_matrix_unit", lambda: request.param == "matrix unit")
    return request.param


def _inputs(
    head: Head, spec: PolicyLossSpec = PLAIN, completions: int = 3, seed: int = 1
) -> dict[str, Tensor]:
    """Ragged completions (one empty), ratios off 1, a reference, a mask."""
    count = len(head.targets)
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, count + 1, (completions,), generator=generator).sort().values
    offsets = torch.cat([torch.tensor([0, 0]), cuts, torch.tensor([count])]).int()
    leaves = [None if t is None else t.double() for t in (head.hidden, head.weight, head.bias)]
    logprobs, _ = plain_logprobs(*leaves, head.targets, spec.temperature)

    def near() -> Tensor:
        noise = torch.randn(count, generator=generator, dtype=torch.float64)
        return (logprobs + 0.3 * noise).float()

    return {
        "advantages": torch.randn(len(offsets) - 1, generator=generator),
        "cu_seqlens": offsets,
        "old_logprobs": near(),
        "ref_logprobs": near(),
        "mask": torch.rand(count, generator=generator) > 0.2,
    }


SPECS = {
    "dapo": PolicyLossSpec(),
    "everything": PolicyLossSpec(
        loss_type="grpo", beta=0.1, entropy_coef=0.02, temperature=0.7, clip_ratio_c=3.0
    ),
    "gspo": PolicyLossSpec(loss_type="gspo", beta=0.1),
    "top entropy": PolicyLossSpec(top_entropy_quantile=0.5, entropy_coef=0.02),
}
SHAPES = [
    pytest.param(63, 33, 1000, id="odd H, rows and V off the tiles"),
    pytest.param(130, 64, 1001, id="odd V, more than one block"),
    pytest.param(7, 48, 96, id="fewer rows than a tile, whole panels"),
    pytest.param(1, 2, 2, id="smallest"),
]


def _run(head: Head, spec: PolicyLossSpec, inputs: dict, **options: object) -> tuple:
    leaves = head.leaves()
    out = linear_grpo_loss(
        leaves[0], leaves[1], head.targets, bias=leaves[2], spec=spec, **inputs, **options
    )
    (out.loss * 2).backward()
    return out, [leaf.grad / 2 for leaf in leaves if leaf is not None]


@pytest.mark.parametrize(("rows", "size", "vocab"), SHAPES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_bf16_beats_plain_pytorch(
    rows: int, size: int, vocab: int, spec: PolicyLossSpec, cpu_path: str
) -> None:
    head = make_head(rows, size, vocab, bias=True)
    inputs = _inputs(head, spec)
    truth, gradients = plain_loss(head, torch.float64, spec, **inputs)
    _, plain = plain_loss(head, BF16, spec, **inputs)
    out, ours = _run(head, spec, inputs)
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
    inputs = _inputs(head, spec)
    truth, gradients = plain_loss(head, torch.float64, spec, **inputs)
    out, ours = _run(head, spec, inputs, impl=impl)
    assert_close(out.loss.detach().double(), truth, rtol=2e-5, atol=1e-6)
    for got, true in zip(ours, gradients, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, true) < (1e-5 if dtype == FP32 else 1e-3)


def test_fp64_runs_the_reference_exactly() -> None:
    head = make_head(20, 8, 50, torch.float64, bias=True)
    spec = SPECS["everything"]
    inputs = _inputs(head, spec)
    truth, gradients = plain_loss(head, torch.float64, spec, **inputs)
    out, ours = _run(head, spec, inputs)
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


def test_chunks_and_dead_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head(200, 32, 500)
    inputs = _inputs(head, completions=6)
    inputs["advantages"][::2] = 0  # whole completions without a gradient
    spec = PolicyLossSpec(loss_type="grpo")
    out, whole = _run(head, spec, inputs)
    monkeypatch.setattr(head_module, "LOGITS_BYTES", 1)
    monkeypatch.setattr(head_gradient, "SLOPES_BYTES", 1)
    small, parts = _run(head, spec, inputs)
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
    inputs = _inputs(head, spec)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 3):
            torch.set_num_threads(threads)
            out, gradients = _run(head, spec, inputs)
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
    _, whole = _run(head, spec, {"advantages": advantages, "cu_seqlens": offsets})
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
    _, (_, expected, *_) = _run(head, spec, inputs)
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
    _, (_, mirrored, *_) = _run(replace(head, hidden=-head.hidden), spec, inputs)
    (3.0 * losses[0]).backward()
    assert_close(total, 3.0 * expected, rtol=1e-4, atol=1e-7)
    losses[1].backward()
    assert_close(total, 3.0 * expected + mirrored, rtol=1e-4, atol=1e-6)
    assert weight.grad is None


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_empty_and_untrained_batches(impl: str) -> None:
    head = make_head(0, 16, 50)
    for offsets in ([0], [0, 0, 0]):
        advantages = torch.ones(len(offsets) - 1)
        out, gradients = _run(
            head,
            PLAIN,
            {"advantages": advantages, "cu_seqlens": torch.tensor(offsets, dtype=torch.int32)},
            impl=impl,
        )
        assert out.loss == 0
        assert [tuple(g.shape) for g in gradients] == [(0, 16), (50, 16)]
        assert not gradients[1].any()
    head = make_head(5, 16, 50)
    inputs = {
        "advantages": torch.ones(1),
        "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32),
        "mask": torch.zeros(5, dtype=torch.bool),
    }
    out, gradients = _run(head, PLAIN, inputs, impl=impl)
    assert out.loss == 0
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_row_stays_alone(impl: str, bad: float) -> None:
    head = make_head(24, 16, 50)
    offsets = torch.tensor([0, 24], dtype=torch.int32)
    inputs = {"advantages": torch.ones(1), "cu_seqlens": offsets}
    spec = PolicyLossSpec(
        aggregation="token-sum", entropy_coef=0.1, entropy_aggregation="token-sum"
    )
    good = torch.arange(24) != 9
    _, expected = _run(head, spec, {**inputs, "mask": good}, impl=impl)
    head.hidden[9, 3] = bad
    out, gradients = _run(head, spec, inputs, impl=impl)
    assert out.loss.isnan()
    assert out.metrics["nonfinite_rows"] == 1
    assert out.logprobs[9].isnan()
    assert out.logprobs[good].isfinite().all()
    for got, wanted in zip(gradients, expected, strict=True):
        assert_close(got, wanted, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_excluded_tokens(impl: str) -> None:
    """A bias of -inf takes a token out; the others share its probability."""
    head = make_head(12, 16, 50, FP32, bias=True)
    head.bias[7] = -float("inf")
    head.targets[head.targets == 7] = 8
    kept = torch.arange(50) != 7
    small = Head(
        head.hidden, head.weight[kept], head.bias[kept], head.targets - (head.targets > 7).long()
    )
    inputs = {"advantages": torch.ones(1), "cu_seqlens": torch.tensor([0, 12], dtype=torch.int32)}
    spec = PolicyLossSpec(entropy_coef=0.1)
    out, gradients = _run(head, spec, inputs, impl=impl)
    expected, wanted = _run(small, spec, inputs, impl=impl)
    assert_close(out.logprobs, expected.logprobs)
    assert_close(out.entropy, expected.entropy)
    assert_close(gradients[0], wanted[0], rtol=1e-4, atol=1e-6)
    assert_close(gradients[1][kept], wanted[1], rtol=1e-4, atol=1e-6)
    assert not gradients[1][7].any()
    head.targets[3] = 7
    out, gradients = _run(head, spec, inputs, impl=impl)
    assert out.logprobs[3] == -float("inf")
    assert out.metrics["nonfinite_rows"] == 1
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_extreme_logits(impl: str) -> None:
    """Equal logits; logits of +-1e4; a target that is 2e4 below the top."""
    hidden = torch.tensor([[0.0], [100.0], [100.0]]).bfloat16()
    weight = torch.tensor([[100.0], [-100.0], [0.0], [50.0]]).bfloat16()
    out = linear_grpo_loss(
        hidden,
        weight,
        torch.tensor([2, 0, 1]),
        torch.ones(1),
        torch.tensor([0, 3], dtype=torch.int32),
        impl=impl,
    )
    assert_close(out.logprobs, torch.tensor([-torch.log(torch.tensor(4.0)), 0.0, -20000.0]))
    assert_close(out.entropy, torch.tensor([torch.log(torch.tensor(4.0)), 0.0, 0.0]))


@pytest.mark.parametrize("label", [-1, -100, 50, 51])
def test_labels_out_of_range_are_refused(label: int) -> None:
    head = make_head(5, 16, 50)
    head.targets[2] = label
    with pytest.raises(ValueError, match=r"outside \[0, 50\)"):
        _run(head, PLAIN, _inputs(make_head(5, 16, 50)))


def test_strides_offsets_and_int32_targets() -> None:
    head = make_head(40, 32, 200)
    inputs = _inputs(head)
    expected, wanted = _run(head, PLAIN, inputs)
    wide = torch.zeros(41, 65, dtype=BF16)
    hidden = wide[1:, 1:].as_strided((40, 32), (65, 2), storage_offset=66)
    hidden.copy_(head.hidden)
    weight = head.weight.T.contiguous().T
    assert not hidden.is_contiguous() and not weight.is_contiguous()
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    out = linear_grpo_loss(hidden, weight, head.targets.int(), **inputs)
    out.loss.backward()
    assert torch.equal(out.logprobs, expected.logprobs)
    assert torch.equal(hidden.grad, wanted[0])
    assert torch.equal(weight.grad, wanted[1])
    same = head.hidden[:1].expand(40, 32)
    out = linear_grpo_loss(same, head.weight, head.targets[:1].expand(40), **inputs)
    assert (out.logprobs == out.logprobs[0]).all()


def test_mixed_inputs_are_refused() -> None:
    head = make_head(5, 16, 50)
    inputs = _inputs(head)
    with pytest.raises(ValueError, match="weight is torch.float32"):
        linear_grpo_loss(head.hidden, head.weight.float(), head.targets, **inputs)
    with pytest.raises(ValueError, match="hidden size"):
        linear_grpo_loss(head.hidden, head.weight[:, :8], head.targets, **inputs)
    with pytest.raises(ValueError, match="targets must be int64"):
        linear_grpo_loss(head.hidden, head.weight, head.targets.float(), **inputs)
    with pytest.raises(ValueError, match="bias is"):
        linear_grpo_loss(head.hidden, head.weight, head.targets, bias=head.weight[0], **inputs)
    with pytest.raises(ValueError, match="meta"):
        linear_grpo_loss(head.hidden, head.weight.to("meta"), head.targets, **inputs)
    with pytest.raises(ValueError, match="vocab_tol"):
        linear_grpo_loss(head.hidden, head.weight, head.targets, vocab_tol=2.0, **inputs)


def test_autocast_is_followed() -> None:
    head = make_head(20, 16, 50, FP32)
    inputs = _inputs(head)
    narrow = Head(head.hidden.to(BF16), head.weight.to(BF16), None, head.targets)
    expected, wanted = _run(narrow, PLAIN, inputs)
    with torch.autocast("cpu", dtype=BF16):
        out, gradients = _run(head, PLAIN, inputs)
    assert torch.equal(out.logprobs, expected.logprobs)
    assert gradients[0].dtype == FP32
    for gradient, exact in zip(gradients, wanted, strict=True):
        assert torch.equal(gradient.to(BF16), exact)


def test_only_wanted_gradients_are_made() -> None:
    head = make_head(20, 16, 50, bias=True)
    inputs = _inputs(head)
    _, everything = _run(head, PLAIN, inputs)
    for wanted in range(3):
        leaves = [t.detach() for t in (head.hidden, head.weight, head.bias)]
        leaves[wanted].requires_grad_()
        out = linear_grpo_loss(leaves[0], leaves[1], head.targets, bias=leaves[2], **inputs)
        out.loss.backward()
        assert torch.equal(leaves[wanted].grad, everything[wanted])
    with torch.no_grad():
        out = linear_grpo_loss(*head.leaves()[:2], head.targets, bias=head.bias, **inputs)
    assert not out.loss.requires_grad


MULTIPLIED = [
    PolicyLossSpec(loss_type="dapo", entropy_coef=0.02, beta=0.1),
    PolicyLossSpec(loss_type="gspo", normalizer=9.0),
]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("spec", MULTIPLIED, ids=["dapo", "gspo"])
def test_multiplicity_stands_for_copies(spec: PolicyLossSpec, impl: str) -> None:
    head = make_head(20, 16, 50, FP32)
    inputs = _inputs(head, spec)
    times = torch.tensor([2, 1, 3, 1, 2])[: len(inputs["advantages"])]
    out, gradients = _run(head, spec, inputs | {"multiplicity": times.float()}, impl=impl)
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
    truth, exact = _run(copies, spec, repeated | {"cu_seqlens": lengths.cumsum(0).int()}, impl=impl)
    assert_close(out.loss, truth.loss, rtol=1e-5, atol=1e-7)
    summed = torch.zeros_like(head.hidden).index_add_(0, rows, exact[0])
    assert relative_error(gradients[0], summed.double()) < 1e-5
    assert relative_error(gradients[1], exact[1].double()) < 1e-5
    for name, value in truth.metrics.items():
        assert_close(out.metrics[name].float(), value.float(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("spec", "multiplicity", "message"),
    [
        (PolicyLossSpec(), torch.ones(3), "one number a completion"),
        (PolicyLossSpec(), torch.ones(5, dtype=torch.int64), "must be float"),
        (PolicyLossSpec(loss_type="grpo"), torch.ones(5), "normalizer"),
        (PolicyLossSpec(top_entropy_quantile=0.5), torch.ones(5), "repeat the completions"),
    ],
)
def test_multiplicity_that_cannot_be(
    spec: PolicyLossSpec, multiplicity: Tensor, message: str
) -> None:
    head = make_head(20, 16, 50, FP32)
    with pytest.raises(ValueError, match=message):
        _run(head, spec, _inputs(head) | {"multiplicity": multiplicity})


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_double_backward_is_refused(impl: str) -> None:
    head = make_head(5, 16, 50)
    leaves = head.leaves()
    out = linear_grpo_loss(*leaves[:2], head.targets, impl=impl, **_inputs(head))
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(out.loss, leaves[0], create_graph=True)


def test_inside_torch_compile() -> None:
    head = make_head(20, 16, 50)
    inputs = _inputs(head)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_grpo_loss(hidden * 2, weight, head.targets, **inputs).loss * 3

    eager, compiled = head.leaves(), head.leaves()
    step(*eager[:2]).backward()
    torch.compile(step, backend="eager")(*compiled[:2]).backward()
    assert torch.equal(eager[0].grad, compiled[0].grad)
    assert torch.equal(eager[1].grad, compiled[1].grad)
