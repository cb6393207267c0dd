"""token_logprobs and linear_logprobs against fp64: values, gradients, awkward and bad input."""

from __future__ import annotations

import pytest
import torch
from closeness import relative_error
from heads import make_head, plain_logprobs
from torch.testing import assert_close

from polymath_fast.kernels import linear_logprobs, token_logprobs

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ERROR = {torch.bfloat16: 2.6e-3, torch.float16: 1e-3, torch.float32: 1e-5}
SHAPES = [(1, 1), (1, 2), (3, 507), (63, 1000), (5, 4097)]


def _exact(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple:
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocab"), SHAPES)
def test_from_logits(rows: int, vocab: int, dtype: torch.dtype, impl: str) -> None:
    logits = (torch.randn(rows, vocab) * 5).to(dtype).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    targets = torch.randint(vocab, (rows,))
    outer = torch.randn(2, rows)
    outer[:, 0] = 0  # a row without a gradient
    exact = _exact(wide, targets, 0.7)
    (exact[0] @ outer[0].double() + exact[1] @ outer[1].double()).backward()
    logprobs, entropy = token_logprobs(logits, targets, temperature=0.7, impl=impl)
    (logprobs @ outer[0] + entropy @ outer[1]).backward()
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert (logprobs <= 0).all() and (entropy >= 0).all()
    assert_close(logprobs.double(), exact[0].detach(), rtol=1e-6, atol=1e-5)
    assert_close(entropy.double(), exact[1].detach(), rtol=1e-6, atol=1e-5)
    assert logits.grad.dtype == dtype
    # where one token has all the probability, both are 0
    assert (logits.grad - wide.grad).norm() <= ERROR[dtype] * wide.grad.norm()
    assert not logits.grad[0].any()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_the_head(dtype: torch.dtype, impl: str) -> None:
    head = make_head(63, 33, 1000, dtype, bias=True)
    outer = torch.randn(2, 63)
    outer[:, 5:20] = 0
    wide, leaves = head.leaves(torch.float64), head.leaves()
    exact = plain_logprobs(*wide, head.targets, 0.7)
    (exact[0] @ outer[0].double() + exact[1] @ outer[1].double()).backward()
    hidden, weight, bias = leaves
    found = linear_logprobs(hidden, weight, head.targets, bias=bias, temperature=0.7, impl=impl)
    (found[0] @ outer[0] + found[1] @ outer[1]).backward()
    for got, true in zip(found, exact, strict=True):
        assert_close(got.double(), true.detach(), rtol=1e-6, atol=1e-5)
    for got, true in zip(leaves, wide, strict=True):
        assert got.grad.dtype == dtype
        assert relative_error(got.grad, true.grad) < 1.2 * ERROR[dtype]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_broken_row_stays_alone(impl: str) -> None:
    logits = torch.randn(5, 40)
    targets = torch.randint(1, 40, (5,))
    logits[:, 0] = -float("inf")  # excluded, which is no fault
    logits[1, 7], logits[2, 7], logits[3] = float("nan"), float("inf"), -float("inf")
    logits.requires_grad_()
    logprobs, entropy = token_logprobs(logits, targets, impl=impl)
    (logprobs[[0, 4]].sum() + entropy[[0, 4]].sum()).backward()
    kept = logits.detach()[[0, 4], 1:].double().requires_grad_()
    exact = _exact(kept, targets[[0, 4]] - 1, 1.0)
    (exact[0].sum() + exact[1].sum()).backward()
    assert logprobs[[1, 2, 3]].isnan().all() and entropy[[1, 2, 3]].isnan().all()
    assert_close(logprobs[[0, 4]].double(), exact[0].detach(), rtol=1e-5, atol=1e-5)
    assert_close(logits.grad[[0, 4], 1:].double(), kept.grad, rtol=1e-4, atol=1e-6)
    assert not logits.grad[[1, 2, 3]].any() and not logits.grad[:, 0].any()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_extreme_and_equal_logits(impl: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [3.0, 3.0, 3.0], [1e4, -1e4, 0.0]])
    logprobs, entropy = token_logprobs(logits, torch.tensor([0, 1, 2, 1]), impl=impl)
    third = float(torch.log(torch.tensor(3.0)))
    assert_close(logprobs, torch.tensor([0.0, -third, -third, -2e4]))
    assert_close(entropy, torch.tensor([0.0, third, third, 0.0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype: torch.dtype) -> None:
    base = torch.randn(9, 2 * 301 + 1).to(dtype)
    targets = torch.randint(300, (8,))
    row = base[:1, 1:301]
    views = {
        "offset": base[1:, 1:301],
        "transposed": base[1:, 1:301].T.contiguous().T,
        "every other": base[1:, 1:601:2],
        "expanded": row.expand(8, 300),
    }
    for view in views.values():
        leaf = view.contiguous().requires_grad_()
        expected = token_logprobs(leaf, targets)
        expected[0].sum().backward()
        view = view.detach().requires_grad_()
        found = token_logprobs(view, targets)
        found[0].sum().backward()
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert torch.equal(view.grad, leaf.grad)


def test_more_elements_than_32_bits_count() -> None:
    row = torch.randn(1, 50_000).bfloat16()
    rows = 2**31 // 50_000 + 5
    logprobs, _ = token_logprobs(row.expand(rows, -1), torch.full((rows,), 49_999))
    assert rows * 50_000 > 2**31
    assert (logprobs == logprobs[0]).all()
    assert_close(logprobs[0].double(), row.double().log_softmax(-1)[0, -1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_no_rows(impl: str) -> None:
    logits = torch.empty(0, 7, requires_grad=True)
    none = torch.empty(0, dtype=torch.long)
    logprobs, entropy = token_logprobs(logits, none, impl=impl)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,)
    hidden, weight = torch.empty(0, 4, requires_grad=True), torch.ones(7, 4, requires_grad=True)
    linear_logprobs(hidden, weight, none, impl=impl)[0].sum().backward()
    assert not weight.grad.any()


def test_bad_input_is_refused() -> None:
    logits, targets = torch.randn(3, 7), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(logits, targets, temperature=0.0)
    with pytest.raises(ValueError, match="outside"):
        token_logprobs(logits, targets + 5)
    with pytest.raises(ValueError, match="logits must be"):
        token_logprobs(logits[0], targets)
    with pytest.raises(ValueError, match="logits must be"):
        token_logprobs(logits.int(), targets)
    with pytest.raises(ValueError, match="targets must be"):
        token_logprobs(logits, targets[:2])
    with pytest.raises(ValueError, match="targets are on meta"):
        token_logprobs(logits, targets.to("meta"))
    with pytest.raises(ValueError, match="must not be empty"):
        token_logprobs(torch.empty(0, 0), targets[:0])


def test_two_runs_are_bit_equal() -> None:
    head = make_head(63, 33, 1000)
    runs = []
    for _ in range(2):
        leaves = head.leaves()
        logprobs, entropy = linear_logprobs(*leaves[:2], head.targets)
        (logprobs.sum() + entropy.sum()).backward()
        runs.append([logprobs, entropy, leaves[0].grad, leaves[1].grad])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
