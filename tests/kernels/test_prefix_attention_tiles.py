"""The compiled tiles of prefix_attention on shapes that fill no panel and no tile."""

from __future__ import annotations

import itertools

import pytest
import torch

from polymath_fast.kernels.prefix_attention import _cpu, reference, tiles
from polymath_fast.kernels.prefix_attention.blocks import Block

CASES = [
    (1, [1], (2, 1), 16),
    (5, [1, 2, 0, 7, 6, 63], (4, 2), 32),  # an empty completion between others
    (63, [64, 65, 1, 97], (3, 3), 64),  # one off a panel, one over a chunk of query rows
    (64, [5, 100], (2, 1), 128),
    (130, [193, 3], (4, 2), 80),  # heads that fill no panel
    (70, [], (2, 2), 64),
]


def gradients(attention, tensors, prompt_len, bounds, grad):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = attention(*leaves, prompt_len, bounds, leaves[0].shape[-1] ** -0.5)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


def torch_pieces(q, k, v, prompt_len, bounds, scale):
    return _cpu.PrefixAttention.apply(q, k, v, prompt_len, bounds, (), scale)


def exact(q, k, v, prompt_len, bounds, scale):
    block = Block(prompt_len, tuple(bound - prompt_len for bound in bounds))
    return reference.prefix_attention(q, k, v, (block,), scale)


@pytest.mark.parametrize(("prompt_len", "lengths", "heads", "size"), CASES)
def test_error_is_that_of_rounding(prompt_len, lengths, heads, size):
    torch.manual_seed(0)
    bounds = tuple(itertools.accumulate(lengths, initial=prompt_len))
    shapes = [(bounds[-1], count, size) for count in (heads[0], heads[1], heads[1], heads[0])]
    *tensors, grad = (torch.randn(shape).bfloat16() for shape in shapes)
    found = gradients(tiles.TileAttention.apply, tensors, prompt_len, bounds, grad)
    pieces = gradients(torch_pieces, tensors, prompt_len, bounds, grad)
    wide = [x.double() for x in tensors]
    truth = gradients(exact, wide, prompt_len, bounds, grad.double())
    for name, ours, theirs, true in zip(
        ("out", "dq", "dk", "dv"), found, pieces, truth, strict=True
    ):
        error, allowed = ((x.double() - true).norm() / true.norm() for x in (ours, theirs))
        assert error <= 1.1 * allowed, f"{name}: {error:.1e}, torch's pieces {allowed:.1e}"
    again = gradients(tiles.TileAttention.apply, tensors, prompt_len, bounds, grad)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@pytest.mark.parametrize(("prompt_len", "lengths"), [(7, [5, 1, 70]), (64, [3]), (5, [0, 0])])
def test_queries_of_the_completions_alone(prompt_len, lengths):
    """The prompt's keys and values come from elsewhere; its rows have no query."""
    torch.manual_seed(0)
    bounds = tuple(itertools.accumulate(lengths, initial=prompt_len))
    q, k, v, grad = (torch.randn(bounds[-1], 2, 32).bfloat16() for _ in range(4))
    grad[:prompt_len] = 0
    whole = gradients(tiles.TileAttention.apply, (q, k, v), prompt_len, bounds, grad)
    alone = (q[prompt_len:], k, v)
    part = gradients(tiles.TileAttention.apply, alone, prompt_len, bounds, grad[prompt_len:])
    for both, some in zip(whole[:2], part[:2], strict=True):
        assert torch.equal(both[prompt_len:], some)
    for both, some in zip(whole[2:], part[2:], strict=True):
        torch.testing.assert_close(both, some)


def test_rows_may_lie_anywhere():
    """Query, key and value rows as slices of one wide row, as a stacked projection leaves them."""
    torch.manual_seed(0)
    stacked = torch.randn(40, 4 + 2 + 2, 32).bfloat16()
    views = stacked[:, :4], stacked[:, 4:6], stacked[:, 6:]
    bounds, grad = (10, 25, 40), torch.randn(40, 4, 32).bfloat16()
    strided = gradients(tiles.TileAttention.apply, views, 10, bounds, grad)
    plain = gradients(tiles.TileAttention.apply, [x.clone() for x in views], 10, bounds, grad)
    assert all(torch.equal(x, y) for x, y in zip(strided, plain, strict=True))


def test_a_poisoned_completion_stays_alone():
    torch.manual_seed(0)
    q, k, v = (torch.randn(30, 2, 16).bfloat16() for _ in range(3))
    bounds = (10, 20, 30)
    grad = torch.ones_like(q)
    k[12] = torch.nan
    out, dq, dk, _ = gradients(tiles.TileAttention.apply, (q, k, v), 10, bounds, grad)
    assert out[12:20].isnan().all() and out[:12].isfinite().all() and out[20:].isfinite().all()
    assert dq[20:].isfinite().all() and dk[20:].isfinite().all()
    assert dk[:10].isnan().any()  # the prompt is shared, and its gradient says so
