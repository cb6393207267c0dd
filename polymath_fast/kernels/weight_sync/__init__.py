"""Every weight of a model from one layout and dtype to another, in one launch."""

from __future__ import annotations

from polymath_fast.kernels import dispatch
from polymath_fast.kernels.autograd import note_written
from polymath_fast.kernels.weight_sync.table import SegmentTable

__all__ = ["SegmentTable", "weight_sync"]


@dispatch.untraced
def weight_sync(table: SegmentTable, *, impl: str = "auto") -> None:
    """destination <- source for every segment of `table`, on the device's current stream.

    Values are rounded as torch's `copy_` does on that device: to the nearest, ties to even, NaN
    stays NaN, denormals are kept; equal dtypes are copied bit for bit. On a GPU nothing waits: work
    that the stream gets afterwards sees the new values. A table of one pair of dtypes is one launch
    ("cuda", "triton"); each further pair is another one.

    Args:
        table: made once; holds its tensors alive and may be used for every update.
        impl: "auto", "cuda" (csrc/weight_sync.cu), "triton", "cpu" or "reference".

    Raises:
        ValueError: `impl` is impossible here.
        RuntimeError: CUDA refused the launch.
    """
    if table.segments:
        dispatch.resolve("weight_sync", table.segments[0].src, impl).weight_sync(table)
        note_written(table.destinations)
