"""csrc/weight_sync.cu through its C interface: addresses and a stream in, an error code out."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from polymath_fast.kernels import dispatch
from polymath_fast.kernels.weight_sync.table import DTYPES, ROW, SegmentTable

_FIELDS = 16
"""room for what `polymath_weight_sync_layout` writes"""


@cache
def library() -> ctypes.CDLL:
    """The compiled file. Raises RuntimeError when it was built from another version's source."""
    path = dispatch.library_path("weight_sync")
    lib = ctypes.CDLL(str(path))
    lib.polymath_weight_sync.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    lib.polymath_error_string.restype = ctypes.c_char_p
    if layout(lib)[1:] != expected_layout():
        raise RuntimeError(f"{path} is of another version; build it again: make setup, or "
                           "pip install -e .")  # fmt: skip
    return lib


def layout(lib: ctypes.CDLL) -> list[int]:
    """Elements a chunk, bytes a segment, and the offset of each of its fields, as compiled."""
    numbers = (ctypes.c_int64 * _FIELDS)()
    return list(numbers[: lib.polymath_weight_sync_layout(numbers, _FIELDS)])


def expected_layout() -> list[int]:
    """Bytes a segment and the offsets of its fields, as Python writes them."""
    return [ROW.itemsize, *(ROW.fields[name][1] for name in ROW.names)]


@cache
def _chunk() -> int:
    return layout(library())[0]


def weight_sync(table: SegmentTable) -> None:
    """destination <- source on the current stream, one launch for each pair of dtypes."""
    lib = library()
    with torch.cuda.device(table.segments[0].dst.device):
        stream = torch.cuda.current_stream().cuda_stream
        for group, rows, chunks in table.on_device(_chunk()):
            dtypes = map(DTYPES.index, group.segments[0].dtypes)
            code = lib.polymath_weight_sync(
                rows.data_ptr(), len(group.segments), chunks, *dtypes, stream
            )
            if code:
                reason = lib.polymath_error_string(code).decode()
                raise RuntimeError(f"weight_sync did not launch: {reason} (CUDA error {code})")
