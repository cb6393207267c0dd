"""The loss from the LM head with awkward shapes, dtypes and values, and with bad input."""

from __future__ import annotations

import pytest
import torch
from head_losses import BF16, FP32, PLAIN, loss_inputs, run
from heads import Head, make_head
from torch import Tensor
from torch.testing import assert_close

from polymath_fast.kernels import PolicyLossSpec, linear_grpo_loss


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_empty_and_untrained_batches(impl: str) -> None:
    head = make_head(0, 16, 50)
    for offsets in ([0], [0, 0, 0]):
        advantages = torch.ones(len(offsets) - 1)
        out, gradients = run(
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
    out, gradients = run(head, PLAIN, inputs, impl=impl)
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
    _, expected = run(head, spec, {**inputs, "mask": good}, impl=impl)
    head.hidden[9, 3] = bad
    out, gradients = run(head, spec, inputs, impl=impl)
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
    out, gradients = run(head, spec, inputs, impl=impl)
    expected, wanted = run(small, spec, inputs, impl=impl)
    assert_close(out.logprobs, expected.logprobs)
    assert_close(out.entropy, expected.entropy)
    assert_close(gradients[0], wanted[0], rtol=1e-4, atol=1e-6)
    assert_close(gradients[1][kept], wanted[1], rtol=1e-4, atol=1e-6)
    assert not gradients[1][7].any()
    head.targets[3] = 7
    out, gradients = run(head, spec, inputs, impl=impl)
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
        run(head, PLAIN, loss_inputs(make_head(5, 16, 50)))


def test_strides_offsets_and_int32_targets() -> None:
    head = make_head(40, 32, 200)
    inputs = loss_inputs(head)
    expected, wanted = run(head, PLAIN, inputs)
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
    inputs = loss_inputs(head)
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
    inputs = loss_inputs(head)
    narrow = Head(head.hidden.to(BF16), head.weight.to(BF16), None, head.targets)
    expected, wanted = run(narrow, PLAIN, inputs)
    with torch.autocast("cpu", dtype=BF16):
        out, gradients = run(head, PLAIN, inputs)
    assert torch.equal(out.logprobs, expected.logprobs)
    assert gradients[0].dtype == FP32
    for gradient, exact in zip(gradients, wanted, strict=True):
        assert torch.equal(gradient.to(BF16), exact)


def test_only_wanted_gradients_are_made() -> None:
    head = make_head(20, 16, 50, bias=True)
    inputs = loss_inputs(head)
    _, everything = run(head, PLAIN, inputs)
    for wanted in range(3):
        leaves = [t.detach() for t in (head.hidden, head.weight, head.bias)]
        leaves[wanted].requires_grad_()
        out = linear_grpo_loss(leaves[0], leaves[1], head.targets, bias=leaves[2], **inputs)
        out.loss.backward()
        assert torch.equal(leaves[wanted].grad, everything[wanted])
    with torch.no_grad():
        out = linear_grpo_loss(*head.leaves()[:2], head.targets, bias=head.bias, **inputs)
    assert not out.loss.requires_grad


@pytest.mark.parametrize(
    ("spec", "multiplicity", "message"),
    [
        (PolicyLossSpec(), torch.ones(3), "one number a completion"),
        (PolicyLossSpec(), torch.ones(5, dtype=torch.int64), "must be float"),
        (PolicyLossSpec(loss_type="grpo"), torch.ones(5), "normalizer"),
        (PolicyLossSpec(top_entropy_quantile=0.5), torch.ones(5), "quantile=0.5.*repeat the compl"),
        (PolicyLossSpec(loss_type="kl_cov"), torch.ones(5), "'kl_cov' ranks.*repeat the compl"),
    ],
)
def test_multiplicity_that_cannot_be(
    spec: PolicyLossSpec, multiplicity: Tensor, message: str
) -> None:
    head = make_head(20, 16, 50, FP32)
    with pytest.raises(ValueError, match=message):
        run(head, spec, loss_inputs(head) | {"multiplicity": multiplicity})


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_double_backward_is_refused(impl: str) -> None:
    head = make_head(5, 16, 50)
    leaves = head.leaves()
    out = linear_grpo_loss(*leaves[:2], head.targets, impl=impl, **loss_inputs(head))
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(out.loss, leaves[0], create_graph=True)


def test_inside_torch_compile() -> None:
    head = make_head(20, 16, 50)
    inputs = loss_inputs(head)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_grpo_loss(hidden * 2, weight, head.targets, **inputs).loss * 3

    eager, compiled = head.leaves(), head.leaves()
    step(*eager[:2]).backward()
    torch.compile(step, backend="eager")(*compiled[:2]).backward()
    assert torch.equal(eager[0].grad, compiled[0].grad)
    assert torch.equal(eager[1].grad, compiled[1].grad)
