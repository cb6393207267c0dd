"""What a process has set changes no number: default dtype, threads, precision of products; and what
an operator writes is known to autograd."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from closeness import relative_error
from heads import Head, make_head
from torch import Tensor
from torch.testing import assert_close

from polymath_fast.kernels import (
    PolicyLossSpec,
    SegmentTable,
    flat_adamw,
    grad_norm,
    grpo_loss,
    importance_weights,
    linear_grpo_loss,
    linear_logprobs,
    policy_loss,
    prefix_attention,
    token_logprobs,
    weight_sync,
)

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
SPECS = {
    "clip": {"entropy_coef": 0.1},
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 1.3, "sapo_temperature_neg": 1.7},
    "vespo": {"loss_type": "vespo"},
    "top entropy": {"top_entropy_quantile": 0.3, "entropy_coef": 0.1},
    "clip_cov": {"loss_type": "clip_cov", "clip_cov_ratio": 0.2, "clip_cov_lb": 0.1},
    "kl_cov": {"loss_type": "kl_cov", "kl_cov_ratio": 0.3},
}


@pytest.fixture(params=[BF16, FP64])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


def batch_of(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, rows, generator=generator, dtype=FP32)
    return {
        "advantages": noise[0],
        "cu_seqlens": torch.tensor([0, rows // 3, rows], dtype=torch.int32),
        "old_logprobs": noise[1] - 5,
    }


def head_results(head: Head, spec: PolicyLossSpec, tolerance: float) -> list[Tensor]:
    hidden, weight, bias = leaves = head.leaves()
    out = linear_grpo_loss(
        hidden,
        weight,
        head.targets,
        bias=bias,
        spec=spec,
        vocab_tol=tolerance,
        **batch_of(60),
    )
    out.loss.backward()
    return [out.loss.detach(), *out.metrics.values(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_the_default_dtype_changes_no_loss(default_dtype, name, dtype, tolerance) -> None:
    given = make_head(60, 64, 900, dtype, bias=True), PolicyLossSpec(**SPECS[name]), tolerance
    expected = head_results(*given)
    torch.set_default_dtype(default_dtype)
    found = head_results(*given)
    assert_close(found, expected, rtol=0, atol=0)


def test_the_default_dtype_changes_no_other_operator(default_dtype) -> None:
    head = make_head(30, 64, 500, BF16)

    def results() -> list[Tensor]:
        rows = head.hidden.view(30, 2, 32)
        offsets = torch.tensor([0, 10, 20], dtype=torch.int32)
        return [
            *linear_logprobs(head.hidden, head.weight, head.targets),
            *token_logprobs((head.hidden @ head.weight.T), head.targets),
            prefix_attention(rows, rows, rows, 10, offsets),
        ]

    expected = results()
    torch.set_default_dtype(default_dtype)
    assert_close(results(), expected, rtol=0, atol=0)


def test_columns_are_left_out_in_half_precision_too() -> None:
    head, spec = make_head(60, 64, 900, torch.float16, bias=True), PolicyLossSpec()
    exact, some = (head_results(head, spec, tolerance) for tolerance in (0.0, 1e-4))
    for one, other in zip(some[-3:], exact[-3:], strict=True):
        assert relative_error(one, other) < 0.01


def test_any_number_of_threads_sums_alike() -> None:
    """Of more tokens than torch sums on one thread."""
    count, before = 70_001, torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, 5, generator=generator, dtype=FP32)
    targets = torch.randint(5, (count,), generator=generator)
    inputs = {**batch_of(count), "old_logprobs": torch.randn(count, dtype=FP32) / 9 - 1.6}
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = grpo_loss(logits, targets, **inputs)
            found.append([out.loss, *out.metrics.values()])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_close(other, found[0], rtol=0, atol=0)


def test_threads_leave_the_precision_of_products_as_it_was() -> None:
    settings = torch.backends.mkldnn.matmul
    head = make_head(40, 32, 300, FP32)
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(40):
                calls = [
                    pool.submit(linear_logprobs, head.hidden, head.weight, head.targets)
                    for _ in range(8)
                ]
                assert all(call.result() for call in calls)
                assert settings.fp32_precision == "bf16"
    finally:
        settings.fp32_precision = before


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_backward_pass_notices_that_its_weights_were_replaced(impl: str) -> None:
    x = torch.randn(2, 3, dtype=FP32).requires_grad_()
    weight = torch.randn(3, 3, dtype=FP32)
    for write in (
        lambda: weight_sync(SegmentTable([torch.zeros(3, 3)], [weight]), impl=impl),
        lambda: _update(weight.view(-1), impl),
    ):
        out = (x @ weight.t()).sum()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


def _update(live: Tensor, impl: str) -> None:
    state = [torch.zeros(len(live), dtype=FP32) for _ in range(2)]
    grad = torch.ones(len(live), dtype=FP32)
    step = torch.zeros((), dtype=torch.int64)
    norm = grad_norm(grad, impl=impl)
    flat_adamw(live, live, *state, grad, norm=norm, step=step, learning_rate=0.1, impl=impl)


def test_a_parameter_may_be_updated_as_it_is() -> None:
    parameter = torch.nn.Parameter(torch.ones(5, dtype=FP32))
    _update(parameter, "cpu")
    assert_close(parameter.detach(), torch.full((5,), 0.9, dtype=FP32))
    state = [torch.zeros(5, dtype=FP32) for _ in range(4)]
    with pytest.raises(ValueError, match=r"segments is a list: must be Segments\.of"):
        flat_adamw(
            state[0],
            *state,
            norm=torch.zeros((), dtype=FP64),
            step=torch.zeros((), dtype=torch.int64),
            learning_rate=0.1,
            segments=[(0, 5, True)],
        )


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_gradients_of_large_logits_are_exact(offset: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 300, generator=generator, dtype=FP32) + offset
    targets, leaf = torch.arange(6), logits.clone().requires_grad_()
    (token_logprobs(leaf, targets)[0] * torch.linspace(-1, 1, 6)).sum().backward()
    truth = logits.double().requires_grad_()
    weighted = truth.log_softmax(-1)[torch.arange(6), targets] * torch.linspace(-1, 1, 6)
    weighted.sum().backward()
    assert_close(leaf.grad.double(), truth.grad, rtol=1e-6, atol=1e-7)


def test_corrections_are_computed_in_float32() -> None:
    policy, sampler = (torch.full((300,), x, dtype=FP32).bfloat16() for x in (-1.0, -1.0078125))
    offsets = torch.tensor([0, 300], dtype=torch.int32)
    options = {"mode": "sequence_truncate", "clip_max": None}
    found = importance_weights(policy, sampler, offsets, **options)
    exact = ((policy.double() - sampler.double()).sum()).exp()
    assert found.dtype == FP32
    assert_close(found.double(), exact[None], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_max": 0.0}, "clip_max=0.0: must be above 0"),
        ({"clip_min": -1.0}, "clip_min=-1.0: must be above 0"),
        ({"clip_min": 4.0}, "clip_min=4.0 is above clip_max=3.0"),
        ({"mask": torch.ones(1, dtype=torch.bool)}, "must be bool like logprobs"),
        ({"logprobs": torch.ones(4, dtype=torch.int64)}, "logprobs is torch.int64"),
    ],
)
def test_corrections_refuse_what_they_cannot_do(changes: dict, message: str) -> None:
    inputs = {"logprobs": torch.zeros(4, dtype=FP32), "cu_seqlens": torch.tensor([0, 4])} | changes
    with pytest.raises(ValueError, match=message):
        importance_weights(inputs.pop("logprobs"), torch.zeros(4, dtype=FP32), **inputs)


@pytest.mark.parametrize("wrong", [-1.0, 0.5, float("nan")])
def test_multiplicities_are_whole(wrong: float) -> None:
    head = make_head(4, 16, 30, FP32)
    batch = {"advantages": torch.ones(1, dtype=FP32), "cu_seqlens": torch.tensor([0, 4])}
    with pytest.raises(ValueError, match="multiplicity must be whole numbers from 0 on"):
        linear_grpo_loss(
            head.hidden,
            head.weight,
            head.targets,
            multiplicity=torch.tensor([wrong], dtype=FP32),
            **batch,
        )


def test_a_completion_that_counts_never_may_be_broken() -> None:
    logprobs = torch.tensor([-1.0, float("nan")], dtype=FP32)
    head = make_head(2, 16, 30, FP32)
    head.hidden[1] = float("nan")
    out = linear_grpo_loss(
        head.hidden,
        head.weight,
        head.targets,
        torch.ones(2, dtype=FP32),
        torch.tensor([0, 1, 2]),
        multiplicity=torch.tensor([1.0, 0.0]),
        spec=PolicyLossSpec(loss_type="reinforce"),
    )
    assert_close(out.loss, -out.logprobs[0])
    assert logprobs[1].isnan() and out.logprobs[1].isnan()


def test_infinite_bounds_are_compiled() -> None:
    spec = PolicyLossSpec(epsilon_high=float("inf"), delta=float("inf"))
    assert PolicyLossSpec.unpacked(spec.packed, None, None) == spec


def test_a_spec_is_a_spec() -> None:
    with pytest.raises(ValueError, match=r"spec is a dict: must be a PolicyLossSpec\(...\)"):
        policy_loss(torch.zeros(2), torch.ones(1), torch.tensor([0, 2]), spec={"epsilon": 0.2})
    with pytest.raises(ValueError, match="logprobs must be a tensor"):
        policy_loss([0.0], torch.ones(1), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="temperature=None"):
        linear_logprobs(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), temperature=None)


@pytest.mark.parametrize("shape", [(4, 2, 0), (4, 0, 8)])
def test_attention_needs_heads_of_floats(shape: tuple[int, ...]) -> None:
    offsets = torch.tensor([0, 2])
    with pytest.raises(ValueError, match="at least one head of at least one entry"):
        prefix_attention(*[torch.ones(shape)] * 3, 2, offsets)
    with pytest.raises(ValueError, match="want bf16, fp16, fp32 or fp64"):
        prefix_attention(*[torch.ones(4, 2, 8, dtype=torch.int64)] * 3, 2, offsets)
