"""That what the interpreter is watched for is seen.

`test_triton_interpreter.py` runs this file.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from interpreter import interpret
from races import RaceError
from triton.runtime.errors import InterpreterError

interpret()


@triton.jit
def _kernel(out_ptr, step, WRITES_SAME: tl.constexpr, READS: tl.constexpr, start=0):
    program = tl.program_id(0)
    lanes = tl.arange(0, 4)
    tl.store(out_ptr + start + program * step + lanes, lanes + (0 if WRITES_SAME else program))
    if READS == "own":
        tl.store(out_ptr + 64 + program, tl.sum(tl.load(out_ptr + program * step + lanes)))
    if READS == "other":
        later = (program + 1) % tl.num_programs(0)
        tl.store(out_ptr + 64 + program, tl.sum(tl.load(out_ptr + later * step + lanes)))
    if READS == "masked":
        tl.store(out_ptr + 64 + program, tl.sum(tl.load(out_ptr + lanes, mask=lanes < 0, other=0)))


def _run(step: int, same: bool, reads: str) -> None:
    _kernel[(3,)](torch.zeros(128, dtype=torch.int64), step, same, reads)


@pytest.mark.parametrize(
    ("step", "same", "reads"), [(4, False, ""), (0, True, ""), (4, False, "masked")]
)
def test_programs_that_do_not_meet(step, same, reads) -> None:
    _run(step, same, reads)


@pytest.mark.parametrize(
    ("step", "reads", "what"),
    [
        (3, "", "two programs store different values"),
        (4, "other", "what another one stores"),
        (4, "own", "what it stored itself"),
    ],
)
def test_a_race_is_seen(step, reads, what) -> None:
    with pytest.raises(RaceError, match=f"_kernel: .*{what}"):
        _run(step, False, reads)


@pytest.mark.parametrize("start", [-3, 61])
def test_an_access_outside_is_seen(start) -> None:
    """Inside of the memory that the argument is a part of."""
    out = torch.zeros(192, dtype=torch.int64)[64:128]
    with pytest.raises(InterpreterError, match="BoundsError.*_kernel: .*outside"):
        _kernel[(1,)](out, 0, False, "", start)


@triton.jit
def _sum_kernel(out_ptr, x_ptr, count, SAYS: tl.constexpr):
    lanes = tl.arange(0, 8)
    if SAYS:
        x = tl.load(x_ptr + lanes, mask=lanes < count, other=0.0)
    else:
        x = tl.load(x_ptr + lanes, mask=lanes < count)
    tl.store(out_ptr, tl.sum(x.to(tl.float32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lanes_that_are_left_out_are_not_zero_by_themselves(dtype) -> None:
    x, out = torch.ones(8, dtype=dtype), torch.zeros(1)
    _sum_kernel[(1,)](out, x, 5, True)
    assert out.item() == 5
    _sum_kernel[(1,)](out, x, 5, False)
    assert out.isnan().all()
    _sum_kernel[(1,)](out, x, 8, False)
    assert out.item() == 8
