"""The loss from what a sampler kept: as accurate as from logits, without computing them."""

from __future__ import annotations

import pytest
import torch
from closeness import relative_error
from heads import Head, make_head, plain_logprobs, plain_loss
from torch import Tensor
from torch.testing import assert_close

from polymath_fast.kernels import PolicyLossSpec, linear_grpo_loss
from polymath_fast.kernels.cpu import head as head_module
from polymath_fast.kernels.cpu import tiles
from polymath_fast.kernels.cpu.head import odd_lines
from polymath_fast.kernels.cpu.recorded_head import RecordedPredictions, Recording
from polymath_fast.kernels.linear_grpo_loss.recorded import recorded_grpo_loss
from polymath_fast.rollout.sampling import sample_tokens

BF16, FP32 = torch.bfloat16, torch.float32
SPECS = {
    "dapo": PolicyLossSpec(),
    "everything local": PolicyLossSpec(loss_type="grpo", beta=0.1, temperature=0.7),
    "gspo": PolicyLossSpec(loss_type="gspo", beta=0.1),
}
SHAPES = [
    pytest.param(63, 33, 1000, id="odd H, rows and V off the tiles"),
    pytest.param(1300, 16, 1001, id="odd V, more than two blocks"),
    pytest.param(7, 48, 96, id="fewer rows than a tile"),
    pytest.param(1, 2, 2, id="smallest"),
]


@pytest.fixture(autouse=True, params=["tiles", "torch"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "available", lambda dtype: request.param == "tiles")


def logits_of(head: Head) -> Tensor:
    values = head.hidden.float() @ head.weight.float().T
    return values if head.bias is None else values + head.bias.float()


def drawn(head: Head, temperature: float, *, lost: int = 3) -> RecordedPredictions:
    """Tokens drawn from `head`, which become its targets, and what was kept of them: from row 5 on,
    all but the last `lost` of a larger batch."""
    count, vocab = len(head.hidden), len(head.weight)
    dtype = head.hidden.dtype
    width = odd_lines(vocab, dtype.itemsize)
    kept = torch.full((count + 9, width), float("nan"), dtype=dtype)
    found = torch.full((count, 4), float("nan"), dtype=torch.float64)
    logits = logits_of(head)
    batch = torch.cat([logits, logits[:1].expand(lost, -1)])
    uniforms = torch.rand(len(batch), dtype=torch.float64, generator=torch.Generator())
    places = torch.cat([torch.arange(count).flip(0), torch.full((lost,), -1)])
    rows = torch.cat([torch.arange(5, 5 + count), torch.full((lost,), -1)])
    recording = Recording(kept, rows, places, found)
    tokens, logprobs = sample_tokens(batch, uniforms, temperature, vocab, recording)
    alone = sample_tokens(batch, uniforms, temperature, vocab)
    assert_close((tokens, logprobs), alone, rtol=0, atol=0, equal_nan=True)
    assert kept[:5].isnan().all() and kept[5 + count :].isnan().all()
    found = found.flip(0)
    recorded = found[:, 0].float()
    assert_close(recorded, logprobs[:count], rtol=0, atol=0, equal_nan=True)
    head.targets = tokens[:count]
    return RecordedPredictions(kept, torch.arange(5, 5 + count), found, temperature)


def inputs_of(head: Head, spec: PolicyLossSpec) -> dict[str, Tensor]:
    count, generator = len(head.targets), torch.Generator().manual_seed(1)
    cuts = torch.randint(0, count + 1, (3,), generator=generator).sort().values
    offsets = torch.cat([torch.tensor([0, 0]), cuts, torch.tensor([count])]).int()
    exact = [None if t is None else t.double() for t in (head.hidden, head.weight, head.bias)]
    logprobs, _ = plain_logprobs(*exact, head.targets, spec.temperature)
    noise = 0.3 * torch.randn(2, count, generator=generator, dtype=torch.float64)
    return {
        "advantages": torch.randn(len(offsets) - 1, generator=generator),
        "cu_seqlens": offsets,
        "old_logprobs": (logprobs + noise[0]).float(),
        "ref_logprobs": (logprobs + noise[1]).float(),
        "mask": torch.rand(count, generator=generator) > 0.2,
    }


def run(loss, head: Head, spec: PolicyLossSpec, inputs: dict, *recorded, **options) -> tuple:
    leaves = head.leaves()
    out = loss(*leaves[:2], head.targets, *recorded, bias=leaves[2], spec=spec, **inputs, **options)
    (out.loss * 2).backward()
    return out, [leaf.grad / 2 for leaf in leaves if leaf is not None]


def from_tape(head: Head, spec: PolicyLossSpec, inputs: dict, kept, **options) -> tuple:
    def loss(hidden, weight, targets, **rest):
        return recorded_grpo_loss(hidden, weight, targets, recorded=kept, **rest)

    return run(loss, head, spec, inputs, **options)


@pytest.mark.parametrize(("rows", "size", "vocab"), SHAPES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_gradients_are_as_near_to_the_truth_as_from_logits(rows, size, vocab, spec, dtype):
    head = make_head(rows, size, vocab, dtype, bias=True)
    kept = drawn(head, spec.temperature)
    inputs = inputs_of(head, spec)
    truth, gradients = plain_loss(head, torch.float64, spec, **inputs)
    _, usual = run(linear_grpo_loss, head, spec, inputs)
    out, ours = from_tape(head, spec, inputs, kept)
    assert float(out.loss.detach()) == pytest.approx(float(truth), rel=2e-5, abs=1e-6)
    exact = [t.double() for t in (head.hidden, head.weight, head.bias)]
    logprobs, entropy = plain_logprobs(*exact, head.targets, spec.temperature)
    assert (out.logprobs - logprobs).abs().max() < 1e-5
    assert (out.entropy - entropy).abs().max() < 1e-5
    spare = 1e-6 if dtype == FP32 else 1e-3 if rows > 1 else 2**-8  # one row is one rounding
    for got, same, true in zip(ours, usual, gradients, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, true) <= 1.5 * relative_error(same, true) + spare


@pytest.mark.parametrize("spread", [1.0, 8.0], ids=["flat", "sure"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_targets_of_one_state_are_multiplied_once(spread, dtype):
    states = torch.tensor([0] * 9 + [1] + [2] * 4 + [3, 3, 5, 4, 5, 0, 3])
    few, temperature = make_head(6, 24, 300, dtype, bias=True, spread=spread), 0.8
    kept = torch.empty(6, odd_lines(300, dtype.itemsize), dtype=dtype)
    found = torch.empty(len(states), 4, dtype=torch.float64)
    recording = Recording(kept, torch.arange(6), torch.arange(len(states)), found)
    uniforms = torch.rand(len(states), dtype=torch.float64, generator=torch.Generator())
    targets, _ = sample_tokens(logits_of(few), uniforms, temperature, 300, recording, states)
    assert len(targets[:9].unique()) < 9  # some are equal
    many = Head(few.hidden[states], few.weight, few.bias, targets)
    spec = PolicyLossSpec(temperature=temperature)
    inputs = inputs_of(many, spec)
    truth, (d_hidden, *others) = plain_loss(many, torch.float64, spec, **inputs)
    d_states = torch.zeros(6, 24, dtype=torch.float64).index_add_(0, states, d_hidden)
    few.targets = targets
    recorded = RecordedPredictions(kept, states, found, temperature)
    out, ours = from_tape(few, spec, inputs, recorded, states=states)
    _, usual = run(linear_grpo_loss, many, spec, inputs)
    assert float(out.loss.detach()) == pytest.approx(float(truth), rel=2e-5, abs=1e-6)
    usual[0] = torch.zeros(6, 24, dtype=torch.float64).index_add_(0, states, usual[0].double())
    spare = 1e-6 if dtype == FP32 else 3e-3
    for got, same, true in zip(ours, usual, (d_states, *others), strict=True):
        assert relative_error(got, true) <= 1.5 * relative_error(same, true) + spare


def test_no_logits_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    head, spec = make_head(63, 32, 1000), PolicyLossSpec()
    kept = drawn(head, 1.0)
    inputs = inputs_of(head, spec)
    monkeypatch.setattr(head_module.Head, "blocks", lambda self: pytest.fail("logits"))
    from_tape(head, spec, inputs, kept)


def test_two_runs_are_equal_bit_for_bit() -> None:
    head, spec = make_head(63, 32, 1000), PolicyLossSpec()
    kept = drawn(head, 1.0)
    inputs = inputs_of(head, spec)
    (_, first), (_, second) = (from_tape(head, spec, inputs, kept) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_what_is_left_of_a_confident_row_keeps_its_digits() -> None:
    head = make_head(40, 16, 500, FP32)
    exact = head.hidden.double() @ head.weight.double().T
    head.hidden *= (14 / (exact.topk(2).values.diff().abs()[:, 0])).float()[:, None]
    kept = drawn(head, 1.0)
    exact = logits_of(head).double()
    truth = -torch.expm1(exact.log_softmax(-1).gather(-1, head.targets[:, None])[:, 0])
    found = kept.found
    assert truth.median() < 1e-5
    assert ((found[:, 3] - truth).abs() < 1e-4 * truth).all()
    assert ((-found[:, 0] - truth).abs() < 1e-4 * truth).all()


def test_live_columns_alone_may_be_multiplied() -> None:
    head, spec = make_head(256, 32, 2000, spread=9.0), PolicyLossSpec()
    kept = drawn(head, 1.0)
    inputs = inputs_of(head, spec)
    out, some = from_tape(head, spec, inputs, kept, vocab_tol="auto")
    _, everything = from_tape(head, spec, inputs, kept)
    assert 0 < float(out.metrics["vocab/live_share"]) <= 1
    for got, true in zip(some, everything, strict=True):
        assert relative_error(got, true.double()) < 3e-3


def test_a_row_of_nan_is_counted_and_has_no_gradient() -> None:
    head, spec = make_head(20, 16, 300, FP32), PolicyLossSpec()
    inputs = inputs_of(head, spec)
    inputs["mask"][4] = True
    sound = make_head(20, 16, 300, FP32)
    head.hidden[4, 0] = float("nan")
    kept = drawn(head, 1.0)
    out = recorded_grpo_loss(*head.leaves()[:2], head.targets, recorded=kept, spec=spec, **inputs)
    assert out.loss.isnan() and out.metrics["nonfinite_rows"] == 1
    hidden, weight = sound.leaves()[:2]
    out = recorded_grpo_loss(hidden, weight, head.targets, recorded=kept, spec=spec, **inputs)
    out.loss.backward()
    assert hidden.grad.isfinite().all() and not hidden.grad[4].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.5}, "temperature 1, the loss of 20 at 0.5"),
        ({"entropy_coef": 0.1}, "entropy_coef=0.1 needs logits"),
    ],
)
def test_what_it_cannot_answer_is_refused(options: dict, message: str) -> None:
    head = make_head(20, 16, 300)
    kept = drawn(head, 1.0)
    inputs = inputs_of(head, PolicyLossSpec())
    with pytest.raises(ValueError, match=message):
        recorded_grpo_loss(
            *head.leaves()[:2],
            head.targets,
            recorded=kept,
            spec=PolicyLossSpec(**options),
            **inputs,
        )


def test_as_many_predictions_as_targets() -> None:
    head, spec = make_head(20, 16, 300), PolicyLossSpec()
    kept = drawn(head, 1.0)
    inputs = inputs_of(head, spec)
    with pytest.raises(ValueError, match="of 19 tokens"):
        recorded_grpo_loss(
            *head.leaves()[:2],
            head.targets,
            recorded=kept._replace(rows=kept.rows[1:]),
            spec=spec,
            **inputs,
        )
