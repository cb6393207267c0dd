"""More logits than an int32 counts, forward and backward: the last rows are as right as the first.

Row i starts one element after row i - 1: no two are equal, and only the gradient, 4.3 GB, lies in
memory as a whole.
"""

from __future__ import annotations

import pytest
import torch
from closeness import relative_error
from torch import Tensor
from torch.testing import assert_close

from polymath_fast.kernels import grpo_loss, token_logprobs

pytestmark = pytest.mark.slow
ROWS, VOCAB = 2**15 + 3, 2**16
LOOKED_AT = torch.tensor([0, 1, 2**14, 2**15 - 1, 2**15, 2**15 + 1, 2**15 + 2])
"""of which the last three lie past element 2 ** 31"""


def overlapping() -> Tensor:
    held = (torch.randn(ROWS + VOCAB) * 3).bfloat16().requires_grad_()
    return held.as_strided((ROWS, VOCAB), (1, 1))


def targets() -> Tensor:
    """The last column among them, which is the very last element."""
    return (torch.arange(ROWS) * 7919 % VOCAB).index_fill(0, torch.tensor(ROWS - 1), VOCAB - 1)


def exact(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that are looked at, their log-probs and entropies, in float64."""
    rows = logits.detach()[LOOKED_AT].double().requires_grad_()
    log_p = rows.log_softmax(-1)
    chosen = log_p.gather(-1, targets()[LOOKED_AT, None])[:, 0]
    return rows, chosen, -(log_p.exp() * log_p).sum(-1)


def require_close(found: Tensor, truth: Tensor) -> None:
    """Row by row, of which one number may be nearly all: bfloat16 rounds it by up to 2 ** -8."""
    for row, (mine, true) in zip(LOOKED_AT, zip(found, truth, strict=True), strict=True):
        assert relative_error(mine, true) < 2**-8, int(row)


def test_token_logprobs() -> None:
    logits = overlapping()
    rows, chosen, entropy = exact(logits)
    by_logprob, by_entropy = torch.randn(2, ROWS)
    (by_logprob[LOOKED_AT] @ chosen.float() + by_entropy[LOOKED_AT] @ entropy.float()).backward()
    found = token_logprobs(logits, targets())
    for mine, true in zip(found, (chosen, entropy), strict=True):
        assert_close(mine[LOOKED_AT].double(), true.detach(), rtol=1e-6, atol=1e-5)
    (gradient,) = torch.autograd.grad(found, logits, (by_logprob, by_entropy))
    require_close(gradient[LOOKED_AT], rows.grad)


def test_grpo_loss_in_place() -> None:
    logits = overlapping().clone(memory_format=torch.contiguous_format)
    advantages = torch.randn(ROWS)
    rows, chosen, _ = exact(logits)
    (-(advantages[LOOKED_AT].double() * chosen).sum() / ROWS).backward()
    offsets = torch.tensor([0, ROWS], dtype=torch.int32)
    out = grpo_loss(logits, targets(), advantages, offsets, inplace=True)
    assert_close(out.logprobs[LOOKED_AT].double(), chosen.detach(), rtol=1e-6, atol=1e-5)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert gradient.data_ptr() == logits.data_ptr() and gradient.shape == (ROWS, VOCAB)
    require_close(gradient[LOOKED_AT], rows.grad)
