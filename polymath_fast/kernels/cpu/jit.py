"""numba's decorator as a CPU's kernels use it: without the GIL, with a cache that is as fresh as
all sources of this folder, and, by option, with arrays that are borrowed.

numba keeps what it compiled as long as the file of the function stays the same. But functions of
other files are part of that; after an update of those it would go on with the old ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba

from polymath_fast.kernels.cpu import matrix_unit

BORROWED = {"nogil": True, "_nrt": False}
"""numba counts references to every slice, with an atomic instruction each time one is made and each
time one is dropped: for a row of a head that takes several times as long as the arithmetic. What is
compiled with these options counts nothing and allocates nothing; its caller holds the arrays."""
INLINED = BORROWED | {"forceinline": True}


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """As numba's, with such a cache."""

    def decorate(function: Callable[..., Any]) -> Any:
        kernel = numba.njit(**({"nogil": True} | options))(function)
        kernel.enable_caching()
        kept = kernel._cache._cache_file
        kept._source_stamp = (kept._source_stamp, _state())
        return kernel

    return decorate


def claim(purpose: str) -> Path | None:
    """A file in the cache that says so, if nobody on this machine has claimed `purpose` for these
    sources; None if somebody has, or no such file can be."""
    digest, unit = _state()
    folder = Path(_anything._cache.cache_path)
    path = folder / f"{purpose}-{digest[:16]}-{'unit' if unit else 'plain'}.claimed"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.open("x").close()
    except OSError:
        return None
    return path


@cache
def _state() -> tuple[str, bool]:
    """Of all sources here, and of what numba does not ask the processor: whether the system lets
    this process use the matrix unit."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest(), matrix_unit.available()


@njit()
def _anything():
    """Tells where the cache is."""
