"""Vectors and blocks of the CPU's attention, each against float64 or against plain indexing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import njit

from polymath_fast.kernels.cpu import attention_vectors, blocks, panel_blocks, tiles
from polymath_fast.kernels.cpu.attention_parts import pack_columns, softmax, turn_block
from polymath_fast.kernels.cpu.moves import turn_words
from polymath_fast.kernels.cpu.operands import bits, words
from polymath_fast.kernels.cpu.scalar import LOG2_E

DTYPES = (torch.bfloat16, torch.float32)
LIMIT = {torch.bfloat16: 2.0**-8, torch.float32: 4e-6}
"""of relative errors: half a step of bfloat16, and what rounding the exponent leaves of float32"""


@njit
def _softmax(row, seen, base, own, scale, out):
    return softmax(row, seen, base, own, scale, out)


def make_slopes():
    @njit
    def slopes(scores, slopes, log_sums, deltas, vectors, firsts, scale, probs, d_scores, panel):
        attention_vectors.pair_slopes(
            scores.ctypes.data, slopes.ctypes.data, log_sums.ctypes.data, deltas.ctypes.data,
            vectors, firsts, scale * np.float32(LOG2_E), scale, probs,
            probs.strides[0], d_scores.ctypes.data, panel.ctypes.data,
        )  # fmt: skip

    return slopes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("seen", "own"), [(0, 1), (1, 64), (63, 17), (64, 1), (130, 65)])
def test_softmax_of_the_keys_that_there_are(seen, own, dtype):
    base = -(-seen // 64) * 64
    used = base + -(-own // 64) * 64
    there = np.r_[0:seen, base : base + own]
    scores = np.full(used, np.nan, np.float32)
    scores[there] = np.random.default_rng(seen).normal(0, 30, len(there))
    out = torch.full((used + 8,), 7, dtype=dtype)
    total, log_sum = _softmax(scores, seen, base, own, np.float32(0.3), bits(out)[:used])
    scaled = scores[there].astype(np.float64) * 0.3
    truth = np.exp(scaled - scaled.max())
    assert total == pytest.approx(truth.sum(), rel=4e-6)
    assert log_sum == pytest.approx(np.log(np.exp(scaled).sum()), rel=1e-6)
    found = out.double().numpy()
    np.testing.assert_allclose(found[there], truth, rtol=LIMIT[dtype], atol=1e-37)
    assert (np.delete(found[:used], there) == 0).all() and (found[used:] == 7).all()


def test_softmax_says_what_is_not_a_number():
    scores, out = np.zeros(64, np.float32), np.empty(64, np.float32)
    scores[5] = np.nan
    assert np.isnan(_softmax(scores, 0, 0, 10, np.float32(1), out)).all()
    assert not np.isnan(_softmax(scores, 0, 0, 5, np.float32(1), out)).any()


def slopes_of(slopes, dtype, vectors, firsts, scale=0.5):
    """What `slopes` finds for two keys, then what is true, both (probs, d_scores) in float64."""
    random = np.random.default_rng(vectors)
    count = 16 * vectors
    scores, upstream = (random.normal(0, 5, (2, 64)).astype(np.float32) for _ in range(2))
    log_sums, deltas = (random.normal(4, 2, 64).astype(np.float32) for _ in range(2))
    scores[0, 0] = -1000
    for row, first in enumerate(firsts):  # what nobody reads may be anything
        scores[row, :first] = upstream[row, :first] = np.nan
    probs, d_scores = (torch.full((2, 96), 7, dtype=dtype) for _ in range(2))
    pairs = dtype == torch.bfloat16
    panel = np.full((1 if pairs else 2, 64), 7, np.uint32 if pairs else np.float32)
    slopes(
        scores, upstream, log_sums / np.float32(np.log(2)), deltas * np.float32(scale), vectors,
        tuple(np.int32(first) for first in firsts), np.float32(scale), bits(probs),
        bits(d_scores), panel,
    )  # fmt: skip
    seen = np.arange(count) >= np.array(firsts)[:, None]
    exact = np.exp(scores[:, :count].astype(np.float64) * scale - log_sums[:count])
    slope = exact * (upstream[:, :count].astype(np.float64) - deltas[:count]) * scale
    truth = [np.where(seen, x, 0) for x in (exact, slope)]
    assert (probs[:, count:] == 7).all() and (d_scores[:, count:] == 7).all()
    assert (panel[:, count:] == 7).all()
    rows = bits(d_scores)[:, :count]
    packed = rows[0] | rows[1].astype(np.uint32) << 16 if pairs else rows
    np.testing.assert_array_equal(panel[:, :count].reshape(packed.shape), packed)
    return [x[:, :count].double().numpy() for x in (probs, d_scores)], truth


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("vectors", "firsts"), [(4, (0, 0)), (2, (-7, 9)), (4, (33, 36)), (2, (32, 1 << 30))]
)
def test_slopes_of_the_queries_that_see_a_key(vectors, firsts, dtype):
    found, truth = slopes_of(make_slopes(), dtype, vectors, firsts)
    for ours, exact in zip(found, truth, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=4 * LIMIT[dtype], atol=1e-37)
        assert (ours[exact == 0] == 0).all()


def test_rounding_is_the_same_without_the_instruction(monkeypatch):
    usual, _ = slopes_of(make_slopes(), torch.bfloat16, 4, (0, 3))
    monkeypatch.setattr(tiles, "_multiplies_pairs", lambda: False)
    other, _ = slopes_of(make_slopes(), torch.bfloat16, 4, (0, 3))
    for some, others in zip(usual, other, strict=True):
        np.testing.assert_array_equal(some, others)


def test_words_are_turned():
    @njit
    def turn(source, out):
        turn_words(source.ctypes.data, source.strides[0], out.ctypes.data, out.strides[0])

    source = np.random.default_rng(0).normal(size=(16, 20)).astype(np.float32)
    out = np.full((16, 24), 7, np.float32)
    turn(source, out)
    np.testing.assert_array_equal(out[:, :16], source[:, :16].T)
    assert (out[:, 16:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 48, 64])
def test_packed_columns_and_turned_blocks(size, dtype):
    rows = torch.randn(100, size).to(dtype)
    turned = torch.empty(size, 64, dtype=dtype)
    turn_block_of = njit(lambda rows, out: turn_block(rows, out))
    turn_block_of(bits(rows), bits(turned))
    assert torch.equal(turned, rows[:64].t())
    pack = njit(lambda rows, count, out: pack_columns(rows, count, out))
    as_words = words(rows)
    out = np.full((2, as_words.shape[1], 64), 7, as_words.dtype)
    pack(bits(rows), 83, out)
    found = out.transpose(0, 2, 1).reshape(128, -1)
    np.testing.assert_array_equal(found[:83], as_words[:83])
    assert (found[83:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [32, 64])
@pytest.mark.parametrize("depth", [16, 64, 96])
def test_sums_of_half_a_panel_and_a_whole_one(depth, columns, dtype):
    @njit
    def multiply(a, panel, out, columns, add):
        before = np.empty(blocks.SAVED, np.uint8)
        blocks.begin(panel, before)
        panel_blocks.multiply_lanes(
            a.ctypes.data, a.strides[0], panel, panel.shape[0], out.ctypes.data, out.strides[0],
            columns, add,
        )  # fmt: skip
        blocks.end(panel, before)

    generator = torch.Generator().manual_seed(depth)
    left = torch.randn(16, depth, generator=generator).to(dtype)
    right = torch.randn(64, depth, generator=generator).to(dtype)
    panel = np.ascontiguousarray(words(right).T)
    truth = (left.double() @ right.double().t()).numpy()
    out = np.full((16, 70), 7, np.float32)
    multiply(bits(left), panel, out, columns, False)
    np.testing.assert_allclose(out[:, :columns], truth[:, :columns], rtol=0, atol=4e-5)
    assert (out[:, 64 if depth % 32 else columns :] == 7).all()
    multiply(bits(left), panel, out, columns, True)
    np.testing.assert_allclose(out[:, :columns], 2 * truth[:, :columns], rtol=0, atol=1e-4)
