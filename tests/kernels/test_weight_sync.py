"""Copies of segments: the table, the CPU, and on a GPU both kernels against torch's copy_."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from weight_sync_cases import BF16, FP32, PAIRS, check, hard_values, layouts, same_values

from polymath_fast.kernels import SegmentTable, dispatch, weight_sync
from polymath_fast.kernels.weight_sync.table import ROW, chunks

COMPILED = dispatch.library_path("weight_sync").is_file()
ON_A_GPU = pytest.mark.parametrize(
    "impl",
    [
        pytest.param("cuda", marks=pytest.mark.skipif(not COMPILED, reason="needs csrc compiled")),
        "triton",
    ],
)
DTYPES = pytest.mark.parametrize(("src", "dst"), PAIRS, ids=str)


@DTYPES
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_on_a_cpu(impl: str, src: torch.dtype, dst: torch.dtype) -> None:
    check(lambda table: weight_sync(table, impl=impl), layouts(src, dst))


@pytest.mark.gpu
@DTYPES
@ON_A_GPU
def test_on_a_gpu(impl: str, src: torch.dtype, dst: torch.dtype) -> None:
    check(lambda table: weight_sync(table, impl=impl), layouts(src, dst, "cuda"))


@pytest.mark.gpu
@ON_A_GPU
def test_a_large_model_and_another_stream(impl: str) -> None:
    """More than 2^31 elements in one segment, and order by stream alone."""
    count = 2**31 + 12_345
    source = torch.empty(count, dtype=BF16, device="cuda").normal_()
    target = torch.zeros(count, dtype=BF16, device="cuda")
    table = SegmentTable([source], [target])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        weight_sync(table, impl=impl)
        same = torch.equal(source, target)
    assert same


@pytest.mark.gpu
@ON_A_GPU
def test_inside_a_cuda_graph(impl: str) -> None:
    source = hard_values(100_000, FP32, "cuda")
    target = torch.zeros(100_000, dtype=BF16, device="cuda")
    table = SegmentTable([source], [target])
    weight_sync(table, impl=impl)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weight_sync(table, impl=impl)
    source.add_(1.0)
    graph.replay()
    same_values(target, source.to(BF16))


def test_neighbours_become_one_segment() -> None:
    source, target = torch.arange(96.0), torch.zeros(96, dtype=BF16)
    parts = [slice(0, 32), slice(64, 96), slice(32, 64)]
    table = SegmentTable(
        [source[part].view(4, 8) for part in parts], [target[part].view(4, 8) for part in parts]
    )
    assert [tuple(s.src.shape) for s in table.segments] == [(1, 96)]
    assert (table.elements, table.bytes) == (96, 96 * 6)
    apart = SegmentTable(list(source.split(32)), [torch.zeros(32) for _ in range(3)])
    assert len(apart.segments) == 3


def test_one_group_a_pair_of_dtypes() -> None:
    sources = [torch.ones(8), torch.ones(8, dtype=BF16), torch.ones(8)]
    targets = [torch.zeros(8, dtype=BF16), torch.zeros(8, dtype=BF16), torch.zeros(8)]
    table = SegmentTable(sources, targets)
    assert [group.segments[0].dtypes for group in table.groups] == [
        (FP32, FP32),
        (FP32, BF16),
        (BF16, BF16),
    ]
    weight_sync(table)
    assert all((target == 1).all() for target in targets)


@pytest.mark.parametrize(
    ("rows", "cols", "expected"),
    [(1, 1, 1), (1, 100, 1), (1, 101, 2), (7, 30, 3), (7, 100, 7), (2, 250, 6), (100, 1, 1)],
)
def test_chunks_by_hand(rows: int, cols: int, expected: int) -> None:
    assert chunks(rows, cols, 100) == expected


def test_rows_of_the_table_are_addresses_sizes_and_running_sums() -> None:
    source, target = torch.zeros(64, 48), torch.zeros(200, dtype=BF16)
    table = SegmentTable([source[:, 8:11], source[0]], [target[:192].view(64, 3), target[152:200]])
    (group,) = table.groups
    rows, total = group.rows(chunk=40)
    assert rows.dtype == ROW and total == 5 + 2
    # 40 // 3 whole rows a chunk; 48 elements are two pieces
    assert rows["first_chunk"].tolist() == [0, 5]
    assert rows["src"].tolist() == [source.data_ptr() + 8 * 4, source.data_ptr()]
    assert rows["dst"].tolist() == [target.data_ptr(), target.data_ptr() + 152 * 2]
    assert rows["src_ld"][0] == 48 and rows["dst_ld"][0] == 3
    assert np.array_equal(rows["cols"], [3, 48])


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (torch.zeros(4), torch.zeros(2, 2), r"source is \(4,\), destination \(2, 2\)"),
        (torch.zeros(4, dtype=torch.float64), torch.zeros(4), "source is torch.float64"),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int8), "destination is torch.int8"),
        (torch.zeros(4, 8).t(), torch.zeros(8, 4), "both must be adjacent"),
        (torch.zeros(4), torch.zeros(4, device="meta"), "must use one device"),
    ],
)
def test_bad_pairs_are_refused(source: torch.Tensor, target: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentTable([source], [target])


def test_nothing_to_copy_and_impossible_demands() -> None:
    weight_sync(SegmentTable([], []))
    weight_sync(SegmentTable([torch.zeros(0)], [torch.zeros(0)]))
    table = SegmentTable([torch.zeros(4)], [torch.zeros(4)])
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        weight_sync(table, impl="cuda")


def test_triton_where_csrc_is_not_compiled() -> None:
    gpu = {"device": "cuda", "dtype": BF16, "capability": (9, 0)}
    assert dispatch.choose("weight_sync", **gpu, built=True)[0] == "cuda"
    name, reason = dispatch.choose("weight_sync", **gpu, built=False)
    assert name == "triton" and "not compiled" in reason
    with pytest.raises(ValueError, match="nvcc"):
        dispatch.choose("weight_sync", **gpu, built=False, impl="cuda")
