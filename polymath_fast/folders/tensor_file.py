"""A safetensors file whose largest tensors several processes write, each its part of them.

The format is eight bytes with the length of a JSON header, the header, and the tensors one after
the other: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8  # of the tensors in the file, for readers that map it
_FLOAT32 = 4


def lay_out(
    path: Path, names: Sequence[str], elements: int, others: Mapping[str, Tensor]
) -> dict[str, int]:
    """Write `others` and make room on the disk for (elements,) float32 tensors `names`; returns the
    first byte of each, for `fill`."""
    from safetensors.torch import save

    packed = save(dict(others))
    (length,) = _LENGTH.unpack_from(packed)
    data = packed[_LENGTH.size + length :]
    size = _FLOAT32 * elements
    header = {
        name: {"dtype": "F32", "shape": [elements], "data_offsets": [size * i, size * (i + 1)]}
        for i, name in enumerate(sorted(names))
    }
    for name, entry in json.loads(packed[_LENGTH.size : _LENGTH.size + length]).items():
        if name != "__metadata__":
            moved = [size * len(names) + offset for offset in entry["data_offsets"]]
            header[name] = entry | {"data_offsets": moved}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = _LENGTH.size + len(text)
    with path.open("wb") as file:
        file.write(_LENGTH.pack(len(text)) + text)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, start + size * len(names) + len(data))
        file.seek(start + size * len(names))
        file.write(data)
    return {name: start + header[name]["data_offsets"][0] for name in names}


def fill(path: Path, first_byte: int, pieces: Iterable[tuple[int, Tensor]]) -> int:
    """Write `pieces`, (first element, (n,) float32 on the CPU), of the tensor that begins at
    `first_byte`; returns the number of elements."""
    written = 0
    with path.open("r+b", buffering=0) as file:
        for first, values in pieces:
            file.seek(first_byte + _FLOAT32 * first)
            left = memoryview(values.numpy()).cast("B")
            while left:
                left = left[file.write(left) :]
            written += values.numel()
    return written
