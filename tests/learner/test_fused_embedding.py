"""The embedding whose gradient is that of the rows that were read, against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polymath_fast.learner.fused_embedding import fuse_embedding

IDS = torch.tensor([[3, 0, 3, 7], [0, 3, 9, 5]])


def pair(dtype=torch.float32, **options):
    torch.manual_seed(0)
    plain = nn.Embedding(10, 6, dtype=dtype, **options)
    ours = nn.Embedding(10, 6, dtype=dtype, **options)
    ours.load_state_dict(plain.state_dict())
    fuse_embedding(ours)
    return ours, plain


@pytest.mark.parametrize("padding", [None, 0, 9])
def test_rows_and_gradients_are_torch_s(padding):
    ours, plain = pair(padding_idx=padding)
    upstream = torch.randn(2, 4, 6)
    for each in (ours, plain):
        for _ in range(2):
            each(IDS).backward(upstream)
    assert torch.equal(ours(IDS), plain(IDS))
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)


def test_equal_rows_add_up_in_float32():
    ours, _ = pair(torch.bfloat16)
    ids, upstream = torch.full((4096,), 3), torch.full((4096, 6), 0.5, dtype=torch.bfloat16)
    ours(ids).backward(upstream)
    assert ours.weight.grad[3].tolist() == [2048.0] * 6


@pytest.mark.parametrize("holds", [False, True])
def test_a_sink_takes_the_gradient(holds):
    ours, plain = pair(padding_idx=0)
    total = torch.full((10, 6), 1.0 if holds else torch.nan)
    ours.weight.gradient_sink = lambda: (total, holds)
    upstream = torch.randn(2, 4, 6)
    ours(IDS).backward(upstream)
    plain(IDS).backward(upstream)
    assert ours.weight.grad is None
    torch.testing.assert_close(total, plain.weight.grad + (1.0 if holds else 0.0))


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}]
)
def test_embeddings_that_do_more_are_left_alone(options):
    ours, _ = pair(**options)
    assert "forward" not in ours.__dict__
