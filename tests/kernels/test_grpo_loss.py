"""The loss from logits against fp64; the gradient in place of the logits."""

from __future__ import annotations

import pytest
import torch
from closeness import relative_error
from torch.testing import assert_close

from polymath_fast.kernels import PolicyLossSpec, grpo_loss, policy_loss

ROWS, VOCAB = 37, 700
OFFSETS = torch.tensor([0, 5, 5, 20, ROWS], dtype=torch.int32)
SPECS = {
    "dapo": PolicyLossSpec(),
    "everything": PolicyLossSpec(loss_type="grpo", beta=0.1, entropy_coef=0.02, temperature=0.7),
    "gspo": PolicyLossSpec(loss_type="gspo"),
    "top entropy": PolicyLossSpec(top_entropy_quantile=0.5),
    "kl_cov": PolicyLossSpec(loss_type="kl_cov", kl_cov_ratio=0.3, ppo_kl_coef=1.0),
}


def _inputs(spec: PolicyLossSpec, logits: torch.Tensor, targets: torch.Tensor) -> dict:
    logprobs = _logprobs(logits.double(), targets, spec)[0]
    near = [(logprobs + 0.3 * torch.randn(ROWS)).float() for _ in range(2)]
    return {
        "advantages": torch.randn(4),
        "cu_seqlens": OFFSETS,
        "old_logprobs": near[0],
        "ref_logprobs": near[1],
        "mask": torch.rand(ROWS) > 0.2,
    }


def _logprobs(logits: torch.Tensor, targets: torch.Tensor, spec: PolicyLossSpec) -> tuple:
    log_p = (logits / spec.temperature).log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_against_fp64(name: str, dtype: torch.dtype, impl: str, inplace: bool) -> None:
    spec = SPECS[name]
    values = (torch.randn(ROWS, VOCAB) * 4).to(dtype)
    targets = torch.randint(VOCAB, (ROWS,))
    inputs = _inputs(spec, values, targets)
    wide = values.double().requires_grad_()
    logprobs, entropy = _logprobs(wide, targets, spec)
    exact = policy_loss(logprobs, entropy=entropy, spec=spec, **inputs)
    (exact.loss * 3).backward()
    leaf = values.clone().requires_grad_()
    out = grpo_loss(leaf * 1, targets, spec=spec, impl=impl, inplace=inplace, **inputs)
    (out.loss * 3).backward()
    assert_close(out.loss.double(), exact.loss, rtol=2e-5, atol=1e-6)
    assert_close(out.logprobs.double(), logprobs.detach(), rtol=1e-6, atol=1e-5)
    assert_close(out.entropy.double(), entropy.detach(), rtol=1e-6, atol=1e-5)
    # The gradient is rounded twice, 2^-9 each in bfloat16: when stored, and times the upstream 3.
    limit = {torch.bfloat16: 3.9e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    assert relative_error(leaf.grad, wide.grad) < limit
    assert not leaf.grad[~inputs["mask"]].any()


def test_inplace_gradient_takes_the_memory_of_the_logits() -> None:
    leaf = torch.randn(ROWS, VOCAB).bfloat16().requires_grad_()
    logits = leaf * 1
    seen = []
    logits.register_hook(seen.append)
    targets = torch.randint(VOCAB, (ROWS,))
    grpo_loss(logits, targets, torch.randn(4), OFFSETS, inplace=True, impl="cpu").loss.backward()
    assert seen[0].data_ptr() == logits.data_ptr()
    kept = leaf * 1
    before = kept.detach().clone()
    grpo_loss(kept, targets, torch.randn(4), OFFSETS, impl="cpu").loss.backward()
    assert torch.equal(kept, before)


def test_inplace_never_writes_over_a_leaf_nor_where_entries_share_memory() -> None:
    targets = torch.randint(VOCAB, (ROWS,))
    advantages = torch.randn(4)
    leaf = torch.randn(ROWS, VOCAB, requires_grad=True)
    before, plain = leaf.detach().clone(), leaf.detach().clone().requires_grad_()
    for logits, inplace in ((leaf, True), (plain, False)):
        out = grpo_loss(logits, targets, advantages, OFFSETS, inplace=inplace, impl="cpu")
        out.loss.backward()
    assert torch.equal(leaf, before) and torch.equal(leaf.grad, plain.grad)
    spread = (leaf * 1).T.contiguous().T
    version = spread._version
    grpo_loss(spread, targets, advantages, OFFSETS, inplace=True, impl="cpu").loss.backward()
    assert torch.equal(spread, before) and spread._version == version


def test_autograd_notices_that_the_logits_are_gone() -> None:
    leaf = torch.randn(ROWS, VOCAB, requires_grad=True)
    logits = leaf * 1
    squares = logits.square().sum()  # saves the logits
    targets = torch.randint(VOCAB, (ROWS,))
    out = grpo_loss(logits, targets, torch.randn(4), OFFSETS, inplace=True, impl="cpu")
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        squares.backward()
    with pytest.raises(RuntimeError, match="inplace"):
        out.loss.backward()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_no_rows_and_no_grad(impl: str) -> None:
    logits = torch.empty(0, 9, requires_grad=True)
    none = torch.empty(0, dtype=torch.long)
    out = grpo_loss(logits, none, torch.empty(0), torch.zeros(1, dtype=torch.int32), impl=impl)
    out.loss.backward()
    assert out.loss == 0 and logits.grad.shape == (0, 9)
    logits = torch.randn(ROWS, 9, requires_grad=True)
    targets = torch.randint(9, (ROWS,))
    with torch.no_grad():
        assert not grpo_loss(logits, targets, torch.ones(4), OFFSETS, impl=impl).loss.requires_grad
    out = grpo_loss(logits, targets, torch.ones(4), OFFSETS, impl=impl)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(out.loss, logits, create_graph=True)
