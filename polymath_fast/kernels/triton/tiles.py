"""Shapes of the matrix products' tiles, and of the chunks they work on, for each kind of GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """Shape of a product's tiles, and how it is run."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 16
    persistent: bool = False
    """one program a multiprocessor, which takes tiles in turn; the forward product only"""

    def options(self) -> dict[str, int]:
        """As a kernel takes them."""
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k,
            "GROUP_M": self.group,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


TILES = {
    "hopper": Tiles(128, 256, 64, 8, 3),
    "ampere": Tiles(128, 128, 32, 8, 4),
    "small": Tiles(128, 128, 32, 8, 3),
    "odd": Tiles(128, 64, 32, 8, 3),
    "interpreter": Tiles(64, 512, 32, 4, 1),
}
"""for compute capability 9.0 and 10.0, for 8.0, for those with 100 KB of shared memory, for
matrices of any steps and addresses, which take more registers, and for checks without a GPU"""
BACKWARD_TILES = TILES | {"interpreter": Tiles(256, 64, 64, 4, 1)}
"""their depth divides the height of `TILES`: rows up to a whole tile are zero past the live ones"""
FLATTENING = (90,)
"""compute capabilities (times 10) where a persistent product joins its loops; 10.0 would spill"""
LIVE_STEP = 128
"""rows; a multiple of the height of all `TILES`"""


def kind_of(device: torch.device) -> str:
    """Key of `TILES`: what fits the device's shared memory and registers."""
    if device.type != "cuda":
        return "interpreter"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] in (9, 10):
        return "hopper"
    return "ampere" if capability == (8, 0) else "small"


def tiles_for(device: torch.device, *operands: torch.Tensor) -> Tiles:
    """Of the forward product of these matrices."""
    return TILES[_kind_for(device, operands)]


def backward_tiles_for(device: torch.device, *matrices: torch.Tensor) -> Tiles:
    """Of a backward product that reads or writes these."""
    return BACKWARD_TILES[_kind_for(device, matrices)]


def _kind_for(device: torch.device, matrices: tuple[torch.Tensor, ...]) -> str:
    """`kind_of`, or "odd" where the address of each number would be computed by itself."""
    kind = kind_of(device)
    if kind == "interpreter":
        return kind
    regular = describable if kind == "hopper" else in_vectors
    return kind if all(regular(matrix) for matrix in matrices) else "odd"


def in_vectors(matrix: torch.Tensor) -> bool:
    """Whether Triton sees that its rows begin at multiples of 16 bytes."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) % 16 == 0 and matrix.stride(1) == 1


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few where an interpreter stands for one."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def flattens(device: torch.device) -> bool:
    """Whether a persistent product joins its loops there; an interpreter does."""
    if device.type != "cuda":
        return True
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor in FLATTENING


def describable(matrix: torch.Tensor) -> bool:
    """Whether the copy engine of Hopper can fetch tiles of it."""
    if matrix.is_cuda and torch.cuda.get_device_capability(matrix.device) < (9, 0):
        return False
    step = matrix.stride(0) * matrix.element_size()
    return (
        matrix.data_ptr() % 16 == 0
        and step % 16 == 0
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.stride(1) == 1
    )


def best_rows(count: int, most: int, depth: int, programs: int, tiles: Tiles) -> int:
    """Rows a chunk should have: the products' tiles then fill whole waves of programs.

    Args:
        count: rows in all. most: rows that memory allows. depth: H. programs: at work at once.

    The cost of all rows is counted in waves of tiles of the gradient of hidden, each as long as the
    vocabulary, plus the weight's gradient, read and written once a chunk: 8 V H bytes take as long
    as about H / 8192 waves.
    """
    tiles_n = -(-depth // tiles.n)
    most = max(most // LIVE_STEP * LIVE_STEP, LIVE_STEP)

    def cost(rows: int) -> float:
        whole, rest = divmod(count, rows)
        waves = whole * _waves(rows, tiles_n, tiles, programs)
        waves += _waves(rest, tiles_n, tiles, programs)
        return waves + (whole + (rest > 0)) * depth / 8192

    if count <= most:
        return most
    # the largest of equals: fewest launches
    return min(range(most, LIVE_STEP - 1, -LIVE_STEP), key=cost)


def _waves(rows: int, tiles_n: int, tiles: Tiles, programs: int) -> int:
    """Turns that the tiles of this many rows take."""
    return -(-(-(-rows // tiles.m) * tiles_n) // programs)
