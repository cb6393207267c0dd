"""Chunks and tiles of the GPU's LM head, as they are chosen: no GPU is asked."""

from __future__ import annotations

import math

import pytest

from polymath_fast.kernels.triton.tiles import BACKWARD_TILES, LIVE_STEP, TILES, best_rows

H200_PROGRAMS = 132
H200_BYTES = 150_754_820_096


def _waves(rows: int, depth: int) -> float:
    """Of tiles of the gradient of hidden, not rounded up."""
    tiles = TILES["hopper"]
    return -(-rows // tiles.m) * -(-depth // tiles.n) / H200_PROGRAMS


@pytest.mark.parametrize(("depth", "vocab"), [(1536, 151_936), (3584, 152_064), (4096, 151_936)])
@pytest.mark.parametrize("count", [65_536, 16_384, 20_001])
def test_chunks_fill_whole_waves(count: int, depth: int, vocab: int) -> None:
    most = H200_BYTES // 64 // (2 * vocab)
    rows = best_rows(count, most, depth, H200_PROGRAMS, TILES["hopper"])
    assert rows <= most and rows % LIVE_STEP == 0
    chunks = [rows] * (count // rows) + [count % rows]
    taken = sum(math.ceil(_waves(chunk, depth)) for chunk in chunks)
    assert _waves(count, depth) > 0.88 * taken


def test_few_rows_are_one_chunk_and_little_memory_is_one_tile() -> None:
    assert best_rows(300, 7000, 3584, H200_PROGRAMS, TILES["hopper"]) >= 300
    assert best_rows(5000, 3, 3584, H200_PROGRAMS, TILES["hopper"]) == LIVE_STEP


@pytest.mark.parametrize("kind", TILES)
def test_zeros_reach_as_far_as_the_products_read(kind: str) -> None:
    """Past the live rows E is zero to the end of a forward tile; backward reads whole blocks."""
    assert LIVE_STEP % TILES[kind].m == 0
    assert TILES[kind].m % BACKWARD_TILES[kind].k == 0
    assert LIVE_STEP % BACKWARD_TILES[kind].k == 0
