"""Copies that every implementation of `weight_sync` must make as torch's copy_ does.

Shared by the files that run them on a CPU, in Triton's interpreter and on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polymath_fast.kernels.weight_sync import SegmentTable

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PAIRS = [(FP32, BF16), (BF16, BF16), (FP32, FP16), (BF16, FP16), (FP16, BF16), (FP32, FP32)]
HARD = [
    0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00008000, 0x00018000, 0x00400000,
    0x3F808000, 0x3F818000, 0x3F80FFFF, 0xBF807FFF, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF,
    0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7F80FFFF, 0x33000001,
    0x387FE000, 0x477FE000, 0x477FF000, 0x38800000, 0x33800000,
]  # fmt: skip
"""fp32 bits: zeros, denormals, ties both ways, values that round to infinity, infinities, NaNs"""

Pairs = list[tuple[Tensor, Tensor]]


def hard_values(count: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """(count,) the hard values first, then random bits of ordinary size."""
    bits = [bit - 2**32 if bit >= 2**31 else bit for bit in HARD]
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, generator=generator)
    hard = torch.tensor(bits, dtype=torch.int32).view(FP32)[:count]
    values[: len(hard)] = hard
    return values.to(dtype).to(device)


def layouts(src_dtype: torch.dtype, dst_dtype: torch.dtype, device: str = "cpu") -> Pairs:
    """One learner's flat memory into an engine's: stacked, sliced, odd, empty and scalar."""
    source = hard_values(60_000, src_dtype, device)
    target = torch.full((60_000,), -7.0, dtype=dst_dtype, device=device)
    stacked = target[:4096].view(64, 64)
    pairs = [
        (source[0:2048].view(32, 64), stacked[:32]),
        (source[2048:4096].view(32, 64), stacked[32:]),
        # the input dimension sliced for the second of two ranks
        (source[8192:12288].view(64, 64)[:, 32:], target[8192:10240].view(64, 32)),
        # rows apart on both sides, a width that is no multiple of 8
        (source[12288:14288].view(50, 40)[:, 3:16], target[12288:13488].view(50, 24)[:, :13]),
        # source and destination off a 16-byte boundary by the same, and by different, amounts
        (source[16003:19999], target[16003:19999]),
        (source[20001:21999], target[20004:22002]),
        (source[24000:24000], target[24000:24000]),
        (source[24001], target[24003]),
        (source[24008:24011], target[24008:24011]),
        # longer than the chunks of tests
        (source[26000:60000], target[26000:60000]),
    ]
    return pairs


def check(run: Callable[[SegmentTable], None], pairs: Pairs) -> SegmentTable:
    """`run` copies exactly what it should, bit for bit, and touches nothing else."""
    target = pairs[0][1]
    whole = target.as_strided((60_000,), (1,), 0)
    expected = whole.clone()
    for src, dst in pairs:
        expected.as_strided(dst.shape, dst.stride(), dst.storage_offset()).copy_(src)
    table = SegmentTable([s for s, _ in pairs], [d for _, d in pairs])
    run(table)
    same_values(whole, expected)
    return table


def same_values(found: Tensor, expected: Tensor) -> None:
    """Equal bits, where NaN of any payload equals NaN (torch's own differ between devices)."""
    assert found.dtype == expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    kind = torch.int32 if found.element_size() == 4 else torch.int16
    real = ~found.isnan()
    assert torch.equal(found[real].view(kind), expected[real].view(kind))
