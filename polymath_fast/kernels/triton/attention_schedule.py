"""Which tile of queries meets which tiles of keys, worked out on the host once a batch.

Rows are [prompt | segment_1 | ... ] for one block after the other; queries are counted like keys,
also where those of the prompts are left out. Query i sees key j when j <= i < last[j], where `last`
is the end of the block for keys of its prompt, and for others the end of all that continues their
segment. Tiles end where a prompt or a block does, but run across segments: short ones fill tiles
together. What a tile has in common with all keys of another is known here, so that most of the work
needs no mask.

Of segments in a tree, a tile of queries meets the ancestors of its first row before its own keys:
whatever another row of the tile continues stands among these or in the tile. Queries of a tile of
keys are one run of rows, with a tree or without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polymath_fast.kernels.prefix_attention.blocks import Block

QUERY_FIELDS = 9
"""first query, end, first key of the prompt and its end, first own key, own tiles without a mask,
shift: queries lie this many rows before the key of the same token; first tile of ancestors, end"""
UNIT_FIELDS = 8
"""first key, end, first query, end, tiles until queries see all keys, tiles without a mask, slot,
shift"""
SUM_FIELDS = 4
"""first key, end, first slot, number of slots"""

UNITS = 512
"""programs that a key gradient is cut into, at least; work of one prompt is spread over them"""
SHORTEST = 1024
"""queries of one program, unless there are no more"""


@dataclass(frozen=True)
class Schedule:
    """Tables of int32, the longest work first."""

    last: np.ndarray
    """(T,) first row that does not see the key"""
    queries: np.ndarray
    """(n, QUERY_FIELDS) tiles of the forward pass"""
    gradients: np.ndarray
    """(g, QUERY_FIELDS) tiles of the query gradient"""
    units: np.ndarray
    """(m, UNIT_FIELDS) pieces of the key and value gradient"""
    runs: np.ndarray
    """(r, 2) first key and end of the tiles of ancestors' keys that `queries` meet"""
    gradient_runs: np.ndarray
    """the same for `gradients`"""
    sums: np.ndarray
    """(s, SUM_FIELDS) key tiles whose gradient comes in several pieces, each in a slot"""
    slots: int


@dataclass(frozen=True)
class Sizes:
    """Rows of the tiles of a kernel."""

    queries: int
    keys: int


def schedule(
    blocks: Sequence[Block],
    forward: Sizes,
    query: Sizes,
    key: Sizes,
    kv_heads: int,
    prompts_ask: bool = True,
) -> Schedule:
    """Tables for rows packed as `blocks`.

    Args:
        forward, query, key: tiles of the three kernels, the gradients' named after what they own.
        kv_heads: programs that take the same unit.
        prompts_ask: whether there are queries of the prompts.
    """
    last, keys, asking, shifts = [], [], [], []
    tiles: dict[Sizes, list[np.ndarray]] = {forward: [], query: []}
    runs = {sizes: _Runs(sizes.keys) for sizes in tiles}
    start = shift = 0
    for block in blocks:
        prompt_len = block.prompt_len
        middle = start + prompt_len
        bounds = middle + np.asarray(block.offsets, dtype=np.int64)
        reach = middle + np.asarray(block.reach(), dtype=np.int64)
        end = int(bounds[-1])
        shift += 0 if prompts_ask else prompt_len
        last += [np.full(prompt_len, end), np.repeat(reach, np.diff(bounds))]
        for sizes, found in tiles.items():
            if prompts_ask:
                found.append(_query_tiles(np.array([start, middle]), (0, 0), sizes, shift))
            above = runs[sizes].add(block, middle)
            found.append(_query_tiles(bounds, (start, middle), sizes, shift, above))
        spans = [_key_tiles(start, middle, key.keys), _key_tiles(middle, end, key.keys)]
        keys += spans
        first = [span[:, 0] for span in spans]
        asking += first if prompts_ask else [np.full_like(first[0], middle), first[1]]
        shifts += [np.full_like(span[:, 0], shift) for span in spans]
        start = end
    ends = np.concatenate(last)
    asked = [np.concatenate(parts) for parts in (keys, asking, shifts)]
    units, sums, slots = _units(*asked, ends, key, kv_heads)
    queries = {sizes: _longest_first(np.concatenate(tiles[sizes]), sizes) for sizes in tiles}
    return Schedule(
        ends.astype(np.int32),
        queries[forward],
        queries[query],
        units,
        runs[forward].table(),
        runs[query].table(),
        sums.astype(np.int32),
        slots,
    )


class _Runs:
    """Tiles of keys of ancestors, of all blocks."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._tiles = [np.empty((0, 2), dtype=np.int64)]
        self._count = 0

    def add(self, block: Block, middle: int) -> np.ndarray:
        """(segments, 2) first tile of each segment, and end."""
        places = []
        for above in block.ancestors():
            tiles = [_key_tiles(middle + low, middle + high, self._size) for low, high in above]
            self._tiles += tiles
            begin = self._count
            self._count += sum(map(len, tiles))
            places.append((begin, self._count))
        return np.array(places, dtype=np.int64).reshape(-1, 2)

    def table(self) -> np.ndarray:
        """(r, 2)"""
        return np.concatenate(self._tiles).astype(np.int32)


def _query_tiles(
    bounds: np.ndarray,
    shared: tuple[int, int],
    sizes: Sizes,
    shift: int,
    above: np.ndarray | None = None,
) -> np.ndarray:
    """Tiles over segments that start at bounds[:-1]; all of them see the keys `shared`, each also
    the tiles `above`."""
    first = np.arange(bounds[0], bounds[-1], sizes.queries)
    end = np.minimum(first + sizes.queries, bounds[-1])
    segment = np.searchsorted(bounds, first, side="right") - 1
    own, segment_end = bounds[segment], bounds[np.minimum(segment + 1, len(bounds) - 1)]
    whole = np.where(segment_end >= end, (first + 1 - own) // sizes.keys, 0)
    table = np.empty((len(first), QUERY_FIELDS), dtype=np.int64)
    table[:, 0], table[:, 1], table[:, 4], table[:, 5] = first, end, own, whole
    table[:, 2:4], table[:, 6] = shared, shift
    table[:, 7:9] = 0 if above is None else above[segment]
    return table


def _key_tiles(start: int, end: int, size: int) -> np.ndarray:
    """(n, 2) first rows and ends."""
    first = np.arange(start, end, size)
    return np.stack([first, np.minimum(first + size, end)], axis=1)


def _longest_first(tiles: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Ordered by the tiles of keys that each tile of queries meets."""
    shared, own = tiles[:, 3] - tiles[:, 2], tiles[:, 1] - tiles[:, 4]
    visits = -(-shared // sizes.keys) - (-own // sizes.keys) + tiles[:, 8] - tiles[:, 7]
    return tiles[np.argsort(-visits, kind="stable")].astype(np.int32)


def _units(
    keys: np.ndarray,
    asking: np.ndarray,
    shifts: np.ndarray,
    last: np.ndarray,
    sizes: Sizes,
    kv_heads: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Units, sums and the number of slots, for tiles of keys whose queries begin at `asking`.

    A tile whose keys are seen by many queries is cut into pieces, so that a prompt of a few tiles
    keeps a whole GPU busy. Slots are bounded by UNITS and the number of tiles, not by T.
    """
    step = sizes.queries
    first, end = keys.T
    # of all keys of a tile: the row behind the last query that sees one, and that sees each
    some, every = np.maximum.reduceat(last, first), np.minimum.reduceat(last, first)
    seen = some - asking
    share = -(-int(seen.sum()) * kv_heads // UNITS)
    chunk = -(-max(share, SHORTEST) // step) * step
    pieces = np.maximum(-(-seen // chunk), 1)
    tile = np.repeat(np.arange(len(keys)), pieces)
    before = np.cumsum(pieces) - pieces
    piece = np.arange(len(tile)) - before[tile]
    table = np.empty((len(tile), UNIT_FIELDS), dtype=np.int64)
    low = asking[tile] + piece * chunk
    high = np.minimum(low + chunk, some[tile])
    behind = -(-np.maximum(end[tile] - 1 - low, 0) // step)
    behind = np.minimum(behind, -(-(high - low) // step))
    whole = (np.minimum(every[tile], high) - low) // step - behind
    table[:, 0], table[:, 1], table[:, 2], table[:, 3] = first[tile], end[tile], low, high
    table[:, 4], table[:, 5] = behind, np.maximum(whole, 0)
    table[:, 7] = shifts[tile]
    split = pieces > 1
    slot_of = np.cumsum(np.where(split, pieces, 0)) - np.where(split, pieces, 0)
    table[:, 6] = np.where(split[tile], slot_of[tile] + piece, -1)
    order = np.argsort(low - high, kind="stable")
    sums = np.stack([first, end, slot_of, pieces], axis=1)[split]
    return table[order].astype(np.int32), sums, int(pieces[split].sum())
