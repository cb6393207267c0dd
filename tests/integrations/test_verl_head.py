"""Our LM head behind verl's two interfaces."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from polymath_fast.integrations.verl import FusedLinearForPPO, linear_cross_entropy


@pytest.fixture
def head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden (2, 4, 8), weight (33, 8), labels (2, 4)"""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 4, 8, generator=generator).requires_grad_()
    weight = torch.randn(33, 8, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(33, (2, 4), generator=generator)


def test_both_interfaces_of_the_head(head) -> None:
    hidden, weight, labels = head
    logprobs = ((hidden @ weight.T) / 0.7).log_softmax(-1)
    picked = logprobs.gather(-1, labels[..., None]).squeeze(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    (expected,) = torch.autograd.grad((picked + 0.3 * entropy).sum(), weight, retain_graph=True)
    module = FusedLinearForPPO(chunk_size=4)(hidden, weight, labels, temperature=0.7)
    flat = linear_cross_entropy(hidden, weight, labels, 0.7, "none")
    for found, shape in ((module, (2, 4)), (flat, (8,))):
        assert_close(found[0], picked.detach().reshape(shape))
        assert_close(found[1], entropy.detach().reshape(shape))
        (gradient,) = torch.autograd.grad((found[0] + 0.3 * found[1]).sum(), weight)
        assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert_close(linear_cross_entropy(hidden, weight, labels, 0.7, "mean")[0], picked.mean())


def test_labels_of_another_shape_are_refused(head) -> None:
    hidden, weight, labels = head
    with pytest.raises(ValueError, match=r"labels are \(4, 2\), hidden \(2, 4, 8\)"):
        FusedLinearForPPO()(hidden, weight, labels.T)


def test_a_split_vocabulary_is_refused(head) -> None:
    with pytest.raises(ValueError, match="dist_process_group"):
        linear_cross_entropy(*head, 1.0, "none", object())
    with pytest.raises(ValueError, match="reduction='max'"):
        linear_cross_entropy(*head, 1.0, "max")


def test_registered_and_patched_in_verl(verl: ModuleType, head) -> None:
    import verl.utils.experimental.torch_functional as in_torch
    import verl.utils.kernel.linear_cross_entropy as in_triton

    from polymath_fast.integrations.verl import patch_verl, register_losses

    assert verl.get_policy_loss_fn(register_losses()[0]).__name__ == "polymath_fast_vanilla"
    hidden, weight, labels = head
    theirs = in_torch.FusedLinearForPPO()(hidden, weight, labels, 0.7)
    before = in_torch.FusedLinearForPPO, in_triton.linear_cross_entropy
    with patch_verl():
        found = in_torch.FusedLinearForPPO()(hidden, weight, labels, 0.7)
        flat = in_triton.linear_cross_entropy(hidden, weight, labels, 0.7, "none")
    assert (in_torch.FusedLinearForPPO, in_triton.linear_cross_entropy) == before
    for mine, flattened, expected in zip(found, flat, theirs, strict=True):
        assert_close(mine, expected)
        assert_close(flattened, expected.flatten())
