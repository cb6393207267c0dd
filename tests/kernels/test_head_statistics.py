"""Log-probs and entropies that are summed up while the logits are made, by the target's logit."""

from __future__ import annotations

import math

import pytest
import torch

from polymath_fast.kernels.cpu import head as cpu_head
from polymath_fast.kernels.cpu.products import TileProducts
from tests.kernels.heads import make_head


def _found(hidden, weight, bias, targets, temperature=1.0):
    """Log-probs, entropies and shares of the other tokens, by our own products on any processor;
    the same whether logits are held or not."""
    heads = [cpu_head.Head(hidden, weight, bias, targets, temperature) for _ in range(2)]
    for head in heads:
        head.products = TileProducts(weight)
    for _ in heads[0].blocks():
        pass
    heads[1].visit()
    torch.testing.assert_close(heads[1].found, heads[0].found, rtol=0, atol=0, equal_nan=True)
    return heads[1].found[0], heads[1].found[1], heads[1].found[3]


def _truth(hidden, weight, bias, targets, temperature=1.0):
    logits = hidden.double() @ weight.double().t()
    logits = (logits if bias is None else logits + bias.double()) / temperature
    logprobs = logits.log_softmax(1)
    probs = logprobs.exp()
    entropy = -torch.where(probs > 0, probs * logprobs, 0).sum(1)
    others = logprobs.scatter(1, targets[:, None], -math.inf).exp().sum(1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy, others


def _assert_close(found, truth, rows=slice(None)):
    for mine, right, tolerance in zip(found, truth, (2e-5, 2e-5, 1e-6), strict=True):
        torch.testing.assert_close(mine[rows], right[rows], rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("vocab", [1, 47, 48, 384, 385, 1000])
@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("bias", [False, True])
def test_sums_of_columns_make_the_softmax(rows, vocab, bias):
    head = make_head(rows, 34, vocab, bias=bias)
    given = (head.hidden, head.weight, head.bias, head.targets, 0.7)
    _assert_close(_found(*given), _truth(*given))


@pytest.mark.parametrize("gap", [18.0, 22.0, 60.0, 100.0, 700.0])
def test_a_target_far_below_the_largest_logit(gap):
    """exp of the distance between them is beyond fp32 from 88 on, entropies suffer earlier."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.ones(3, 2).bfloat16()
    weight = torch.randn(500, 2, generator=generator).bfloat16()
    weight[7] = torch.tensor([-gap, 0.0])
    weight[9] = weight[11] = torch.tensor([3.0, 3.0])
    given = (hidden, weight, None, torch.tensor([7, 9, 20]))
    _assert_close(_found(*given), _truth(*given))


def test_a_target_that_is_nearly_certain_keeps_its_digits():
    weight = torch.zeros(500, 2).bfloat16()
    weight[3] = torch.tensor([40.0, 0.0])
    given = (torch.ones(1, 2).bfloat16(), weight, None, torch.tensor([3]))
    logprob, entropy, others = _found(*given)
    assert float(others) == pytest.approx(499 * math.exp(-40), rel=1e-6)
    assert float(logprob) == pytest.approx(-499 * math.exp(-40), rel=1e-6)
    assert float(entropy) == pytest.approx(41 * 499 * math.exp(-40), rel=1e-6)


def test_rows_that_are_not_finite_are_none_of_the_others_business():
    head = make_head(6, 34, 500, bias=True)
    head.bias[5] = -math.inf  # excluded, and the target of a row
    head.targets[0] = 5
    sound = _truth(head.hidden, head.weight, head.bias, head.targets)
    head.hidden[2, 3] = math.nan
    head.hidden[4] = torch.where(head.weight[8] > 0, math.inf, -math.inf)
    found = _found(head.hidden, head.weight, head.bias, head.targets)
    _assert_close(found, sound, torch.tensor([1, 3, 5]))
    assert found[0][0] == -math.inf
    assert found[1][0] == pytest.approx(float(sound[1][0]), abs=2e-5)
    assert found[0][2].isnan()
    assert not found[0][4].isfinite()


def test_far_rows_of_several_blocks_find_their_places():
    head = make_head(2 * cpu_head.ROWS_ALONE + 6, 34, 130)
    far = torch.tensor([3, cpu_head.ROWS_ALONE, 2 * cpu_head.ROWS_ALONE + 5])
    # their target's logit is far below the others'
    head.hidden[far] = head.weight[9] * 60 / head.weight[9].float().square().sum()
    head.targets[far] = (head.hidden[far].float() @ head.weight.float().t()).argmin(1)
    given = (head.hidden, head.weight, head.bias, head.targets)
    found = _found(*given)
    assert (found[0][far] < -60).all()
    _assert_close(found, _truth(*given))
