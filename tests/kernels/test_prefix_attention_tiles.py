"""The compiled tiles of prefix_attention on shapes that fill no panel and no tile."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_checks import LAYOUTS, TREES, compare, make, offsets_of, run
from closeness import relative_error

from polymath_fast.kernels.prefix_attention import _cpu, reference, tiles
from polymath_fast.kernels.prefix_attention.blocks import Block, one_by_one, to_blocks

DTYPES = (torch.bfloat16, torch.float32)
CASES = [
    (1, [1], (2, 1), 16),
    (5, [1, 2, 0, 7, 6, 63], (4, 2), 32),  # an empty completion between others
    (63, [64, 65, 1, 97], (3, 3), 64),  # one off a panel, one over a chunk of query rows
    (64, [5, 100], (2, 1), 128),
    (130, [193, 3], (4, 2), 80),  # heads that fill no panel
    (70, [], (2, 2), 64),
]
TREE = ([70, 3, 99, 1, 40, 0, 33, 130, 5], [-1, 0, 1, 1, 0, -1, -1, 6, 6])


def block_of(prompt_len, lengths, parents=()):
    return Block(prompt_len, tuple(itertools.accumulate(lengths, initial=0)), tuple(parents))


def gradients(attention, tensors, block, grad):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = attention(*leaves, block, leaves[0].shape[-1] ** -0.5)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


def torch_pieces(q, k, v, block, scale):
    bounds = tuple(block.prompt_len + offset for offset in block.offsets)
    return _cpu.PrefixAttention.apply(q, k, v, block.prompt_len, bounds, block.parents, scale)


def exact(q, k, v, block, scale):
    return reference.prefix_attention(q, k, v, (block,), scale)


def in_tiles(q, k, v, blocks, scale):
    """As an implementation, whether or not `fits` takes it on this processor."""
    return one_by_one(lambda *x: tiles.TileAttention.apply(*x, scale), q, k, v, blocks)


def assert_error_is_that_of_rounding(block, heads, size, dtype):
    torch.manual_seed(0)
    rows = block.prompt_len + block.offsets[-1]
    shapes = [(rows, count, size) for count in (heads[0], heads[1], heads[1], heads[0])]
    *tensors, grad = (torch.randn(shape).to(dtype) for shape in shapes)
    found = gradients(tiles.TileAttention.apply, tensors, block, grad)
    pieces = gradients(torch_pieces, tensors, block, grad)
    wide = [x.double() for x in tensors]
    truth = gradients(exact, wide, block, grad.double())
    # one rounding of float32 on top: there both are mostly exact, and the order of sums decides
    spare = 2.0**-23 if dtype == torch.float32 else 0.0
    for name, ours, theirs, true in zip(
        ("out", "dq", "dk", "dv"), found, pieces, truth, strict=True
    ):
        error, allowed = (relative_error(x, true) for x in (ours, theirs))
        allowed = 1.1 * allowed + spare
        assert error <= allowed, f"{name}: {error:.1e}, torch's pieces {allowed:.1e}"
    again = gradients(tiles.TileAttention.apply, tensors, block, grad)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("prompt_len", "lengths", "heads", "size"), CASES)
def test_error_is_that_of_rounding(prompt_len, lengths, heads, size, dtype):
    assert_error_is_that_of_rounding(block_of(prompt_len, lengths), heads, size, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tree_of_segments_longer_than_panels_and_chunks(dtype):
    assert_error_is_that_of_rounding(block_of(61, *TREE), (4, 2), 48, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", (LAYOUTS | TREES).values(), ids=LAYOUTS | TREES)
@pytest.mark.parametrize("alone", [False, True])
def test_agrees_with_float64(layout, dtype, alone):
    compare(in_tiles, layout, dtype=dtype, alone=alone)


def test_few_ranges_where_the_sums_they_keep_apart_would_be_large(monkeypatch):
    layout = TREES["deep and shallow"]
    tensors = make(layout, (6, 2), 16, torch.float32)
    many = run(in_tiles, tensors, layout, 0.3)
    tiles._work.cache_clear()
    monkeypatch.setattr(tiles, "_SHARES", 0)
    few = run(in_tiles, tensors, layout, 0.3)
    (block,) = to_blocks(offsets_of(layout), len(tensors[0]), len(tensors[0]))
    work = tiles._work(block, 2, 2 * 2 * 16 * 4, False, torch.get_num_threads())
    tiles._work.cache_clear()
    assert len(work.ranges) == torch.get_num_threads()
    for some, others in zip(many, few, strict=True):
        torch.testing.assert_close(some, others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "block", [block_of(7, [5, 1, 70]), block_of(64, [3]), block_of(5, [0, 0]), block_of(9, *TREE)]
)
def test_queries_of_the_completions_alone(block, dtype):
    """The prompt's keys and values come from elsewhere; its rows have no query."""
    torch.manual_seed(0)
    prompt = block.prompt_len
    q, k, v, grad = (torch.randn(prompt + block.offsets[-1], 2, 32).to(dtype) for _ in range(4))
    grad[:prompt] = 0
    whole = gradients(tiles.TileAttention.apply, (q, k, v), block, grad)
    part = gradients(tiles.TileAttention.apply, (q[prompt:], k, v), block, grad[prompt:])
    for both, some in zip(whole[:2], part[:2], strict=True):
        assert torch.equal(both[prompt:], some)
    for both, some in zip(whole[2:], part[2:], strict=True):
        torch.testing.assert_close(both, some)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_lie_anywhere(dtype):
    """Query, key and value rows as slices of one wide row, as a stacked projection leaves them."""
    torch.manual_seed(0)
    stacked = torch.randn(40, 4 + 2 + 2, 32).to(dtype)
    views = stacked[:, :4], stacked[:, 4:6], stacked[:, 6:]
    block, grad = block_of(10, [15, 15]), torch.randn(40, 4, 32).to(dtype)
    strided = gradients(tiles.TileAttention.apply, views, block, grad)
    plain = gradients(tiles.TileAttention.apply, [x.clone() for x in views], block, grad)
    assert all(torch.equal(x, y) for x, y in zip(strided, plain, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_poisoned_completion_stays_alone(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(30, 2, 16).to(dtype) for _ in range(3))
    grad = torch.ones_like(q)
    k[12] = torch.nan
    block = block_of(10, [10, 10])
    out, dq, dk, _ = gradients(tiles.TileAttention.apply, (q, k, v), block, grad)
    assert out[12:20].isnan().all() and out[:12].isfinite().all() and out[20:].isfinite().all()
    assert dq[20:].isfinite().all() and dk[20:].isfinite().all()
    assert dk[:10].isnan().any()  # the prompt is shared, and its gradient says so
