"""Shapes of attention tiles for a GPU, a width of heads and a dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from polymath_fast.kernels.triton.attention_schedule import Sizes


@dataclass(frozen=True)
class Way:
    """How one kernel runs."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def sizes(self) -> Sizes:
        """What the host has to know."""
        return Sizes(self.queries, self.keys)


@dataclass(frozen=True)
class Tiles:
    """How the three kernels run: the gradients' are named after what a program owns."""

    forward: Way
    query: Way
    key: Way


TILES: dict[str, dict[int, Tiles]] = {
    "hopper": {
        64: Tiles(Way(128, 128, 8, 3), Way(128, 64, 8, 2), Way(64, 128, 8, 2)),
        128: Tiles(Way(128, 64, 8, 3), Way(128, 64, 8, 2), Way(64, 128, 8, 2)),
        256: Tiles(Way(128, 32, 8, 2), Way(128, 32, 8, 2), Way(32, 32, 8, 2)),
    },
    "small": {
        64: Tiles(Way(128, 64, 4, 3), Way(128, 64, 8, 2), Way(64, 64, 4, 2)),
        128: Tiles(Way(128, 64, 8, 2), Way(128, 32, 8, 2), Way(32, 64, 4, 2)),
        256: Tiles(Way(64, 32, 8, 2), Way(64, 32, 8, 1), Way(32, 32, 8, 1)),
    },
    "single": {
        64: Tiles(Way(32, 32, 4, 1), Way(32, 32, 4, 1), Way(32, 32, 4, 1)),
        128: Tiles(Way(16, 32, 4, 1), Way(16, 32, 4, 1), Way(16, 16, 4, 1)),
    },
    "interpreter": dict.fromkeys(
        (64, 128, 256), Tiles(Way(32, 16, 4, 1), Way(16, 32, 4, 1), Way(32, 16, 4, 1))
    ),
}
"""width of a head -> tiles, for compute capability 9.0 and 10.0, for the rest, for fp32 on any, and
for checks without a GPU. All but Hopper's fit 99 KiB of shared memory."""


def width_of(depth: int) -> int:
    """Entries of a tile's row for heads of `depth` entries: a power of two, 16 at least."""
    return max(16, 1 << (depth - 1).bit_length())


def tiles_for(device: torch.device, dtype: torch.dtype, depth: int) -> Tiles:
    """The tiles that fit.

    Raises:
        ValueError: heads of `depth` entries are too wide for `dtype`.
    """
    kind = kind_of(device, dtype)
    widest = max(TILES[kind])
    if depth > widest:
        raise ValueError(
            f"head_dim {depth} in {dtype}: the Triton implementation takes up to {widest}; "
            "use impl='reference'" + " or bfloat16" * (depth <= max(TILES["small"]))
        )
    return fitting(kind, depth)


def fitting(kind: str, depth: int) -> Tiles:
    """The tiles of `kind` for heads of `depth` entries."""
    width = width_of(depth)
    tiles = TILES[kind][max(width, min(TILES[kind]))]
    if depth == width or kind == "interpreter":
        return tiles
    # masks along the head take registers, too
    return replace(
        tiles,
        forward=replace(tiles.forward, keys=max(tiles.forward.keys // 2, 16)),
        key=replace(tiles.key, queries=max(tiles.key.queries // 2, 16)),
    )


def kind_of(device: torch.device, dtype: torch.dtype) -> str:
    """A key of `TILES`."""
    if device.type != "cuda":
        return "interpreter"
    if dtype == torch.float32:
        return "single"
    return "hopper" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "small"
