"""Chunks and tiles of the GPU's LM head, as they are chosen: no GPU is asked."""

from __future__ import annotations

import math

import pytest
import torch

from polymath_fast.kernels.triton import tiles
from polymath_fast.kernels.triton.budget import Gpu, chunk_rows, head_bytes
from polymath_fast.kernels.triton.tiles import BACKWARD_TILES, LIVE_STEP, TILES, best_rows

H200_PROGRAMS = 132
H200 = Gpu(150_754_820_096, H200_PROGRAMS, "hopper")
H100 = Gpu(85_017_493_504, H200_PROGRAMS, "hopper")
BF16 = torch.bfloat16


def _waves(rows: int, depth: int) -> float:
    """Of tiles of the gradient of hidden, not rounded up."""
    tiles = TILES["hopper"]
    return -(-rows // tiles.m) * -(-depth // tiles.n) / H200_PROGRAMS


@pytest.mark.parametrize(("depth", "vocab"), [(1536, 151_936), (3584, 152_064), (4096, 151_936)])
@pytest.mark.parametrize("count", [65_536, 16_384, 20_001])
def test_chunks_fill_whole_waves(count: int, depth: int, vocab: int) -> None:
    most = H200.memory // 64 // (2 * vocab)
    rows = chunk_rows(count, vocab, depth, BF16, H200)
    assert rows <= most and rows % LIVE_STEP == 0
    chunks = [rows] * (count // rows) + [count % rows]
    taken = sum(math.ceil(_waves(chunk, depth)) for chunk in chunks)
    assert _waves(count, depth) > 0.88 * taken


def test_few_rows_are_one_chunk_and_little_memory_is_one_tile() -> None:
    assert best_rows(300, 7000, 3584, H200_PROGRAMS, TILES["hopper"]) >= 300
    assert best_rows(5000, 3, 3584, H200_PROGRAMS, TILES["hopper"]) == LIVE_STEP


@pytest.mark.parametrize("gpu", [H100, H200], ids=["H100", "H200"])
@pytest.mark.parametrize(("vocab", "depth"), [(151_936, 1536), (152_064, 3584)], ids=["1.5B", "7B"])
def test_the_head_holds_its_chunk_and_the_gradients(gpu: Gpu, vocab: int, depth: int) -> None:
    """Counted by hand: bf16 exponentials of a 64th of the device, and what is beside them."""
    count = 16_384
    rows = chunk_rows(count, vocab, depth, BF16, gpu)
    exps = 2 * rows * vocab
    assert 0.5 * gpu.memory / 64 < exps <= gpu.memory / 64
    assert 0.75e9 < exps < 2.4e9
    partial = 12 * rows * math.ceil(vocab / 256)
    gathered = 2 * 2 * rows * depth
    gradients = 2 * count * depth + 4 * vocab * depth
    found = head_bytes(count, vocab, depth, BF16, gpu)
    assert found == gradients + max(exps + partial + gathered, 2 * vocab * depth)
    # half of the columns of a chunk, of the weight, and of its gradient in fp32
    room = vocab // 2 // LIVE_STEP * LIVE_STEP
    some = head_bytes(count, vocab, depth, BF16, gpu, some_columns=True)
    copies = 2 * rows * room + (2 + 4) * room * depth
    assert some == gradients + exps + partial + gathered + copies


def test_few_rows_hold_no_whole_chunk() -> None:
    """What counts then is the weight's gradient, in fp32 and once more in its dtype."""
    assert head_bytes(100, 151_936, 1536, BF16, H200) == 2 * 100 * 1536 + 6 * 151_936 * 1536
    single = head_bytes(100, 151_936, 1536, torch.float32, H200)
    chunk = 100 * (4 * 151_936 + 2 * 4 * 1536)
    assert single == 4 * 100 * 1536 + 4 * 151_936 * 1536 + chunk


@pytest.mark.parametrize("kind", TILES)
def test_zeros_reach_as_far_as_the_products_read(kind: str) -> None:
    """Past the live rows E is zero to the end of a forward tile; backward reads whole blocks."""
    assert LIVE_STEP % TILES[kind].m == 0
    assert TILES[kind].m % BACKWARD_TILES[kind].k == 0
    assert LIVE_STEP % BACKWARD_TILES[kind].k == 0


@pytest.mark.parametrize("kind", ["hopper", "ampere", "small"])
def test_matrices_of_odd_steps_have_tiles_of_their_own(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "kind_of", lambda device: kind)
    device, good = torch.device("cpu"), torch.zeros(8, 48, dtype=BF16)
    memory = torch.zeros(9 * 49, dtype=BF16)
    odd = {
        "step": memory[: 8 * 49].view(8, 49)[:, :48],
        "address": memory[1 : 1 + 8 * 48].view(8, 48),
    }
    chosen = (tiles.tiles_for, TILES), (tiles.backward_tiles_for, BACKWARD_TILES)
    for choose, table in chosen:
        assert choose(device, good, good) is table[kind]
        for name, matrix in odd.items():
            assert choose(device, matrix, good) is choose(device, good, matrix) is table["odd"], (
                name
            )
