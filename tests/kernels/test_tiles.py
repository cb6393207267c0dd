"""The CPU's tiles: sums against float64, and the instructions they become on other processors."""

from __future__ import annotations

import re

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from llvmlite import ir
from numba import njit

from polymath_fast.kernels.cpu import tiles
from polymath_fast.kernels.cpu.operands import words

dot_tile, square_tile, narrow_tile = tiles.dot_tile, tiles.square_tile, tiles.narrow_tile


@njit
def _wide(a, b, out, add):
    dot_tile(a.ctypes.data, a.strides[0], 4, b, b.shape[0], out.ctypes.data, out.strides[0], add)


@njit
def _square(a, b, out, add):
    place, out_step = out.ctypes.data, out.strides[0]
    square_tile(a.ctypes.data, a.strides[0], 4, b, b.shape[0], place, out_step, add)


@njit
def _narrow(a, b, out, add):
    """Columns 16 to 32 of each panel."""
    place, out_step = out.ctypes.data, out.strides[0]
    narrow_tile(a.ctypes.data, a.strides[0], 4, b[:, 16:], b.shape[0], place, out_step, add)


SHAPES = {(tiles.ROWS, tiles.COLUMNS): _wide, (6, 64): _square}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("depth", [2, 66])
def test_sums_are_those_of_the_factors(shape, dtype, depth):
    generator = torch.Generator().manual_seed(depth)
    rows, columns = shape
    left = torch.randn(rows, depth, generator=generator).to(dtype)
    right = torch.randn(depth, columns, generator=generator).to(dtype)
    per_word = 4 // left.element_size()
    packed = right.view(-1, per_word, columns).transpose(1, 2).reshape(-1, columns * per_word)
    truth = left.double() @ right.double()
    out = np.full((rows, columns + 3), 7, np.float32)  # a step of its own
    SHAPES[shape](words(left), words(packed.contiguous()), out, False)
    np.testing.assert_allclose(out[:, :columns], truth, rtol=0, atol=2e-5)
    SHAPES[shape](words(left), words(packed.contiguous()), out, True)
    np.testing.assert_allclose(out[:, :columns], 2 * truth, rtol=0, atol=4e-5)
    assert (out[:, columns:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_some_columns_of_a_panel(dtype):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*s, generator=generator).to(dtype) for s in ((6, 40), (40, 64)))
    per_word = 4 // left.element_size()
    packed = right.view(-1, per_word, 64).transpose(1, 2).reshape(-1, 64 * per_word).contiguous()
    out = np.full((6, 20), 7, np.float32)
    _narrow(words(left), words(packed), out, False)
    truth = left.double() @ right[:, 16:32].double()
    np.testing.assert_allclose(out[:, :16], truth, rtol=0, atol=2e-5)
    assert (out[:, 16:] == 7).all()


CPUS = {
    ("cooperlake", tiles._Pairs): "vdpbf16ps",
    ("skylake-avx512", tiles._Singles): "vfmadd231ps.*zmm",
    ("haswell", tiles._Singles): "vfmadd231ps.*ymm",
}


@pytest.mark.parametrize("shape", [*SHAPES, (6, 16)])
@pytest.mark.parametrize(("cpu", "kind"), CPUS)
def test_inner_loops_multiply_and_keep_their_sums_in_registers(monkeypatch, cpu, kind, shape):
    wide = cpu != "haswell"
    monkeypatch.setattr(tiles, "_has", lambda feature: wide)
    rows, columns = shape
    loops = _loops(_assembly(cpu, kind(), rows, columns))
    lanes = 16 if wide else 8
    for loop in loops:
        assert "(%rsp" not in loop, "a spill"
    found = sum(len(re.findall(CPUS[cpu, kind], loop)) for loop in loops)
    assert found == rows * columns // lanes


def _assembly(cpu: str, kind: tiles._Pairs | tiles._Singles, rows: int, columns: int) -> str:
    """x86 assembly of one tile, for `cpu`."""
    module = ir.Module()
    whole = ir.IntType(64)
    signature = ir.FunctionType(ir.VoidType(), [whole] * 7 + [ir.IntType(1)])
    function = ir.Function(module, signature, "tile")
    builder = ir.IRBuilder(function.append_basic_block())
    for part in kind.parts(rows, columns):
        tiles._emit_dot_tile(builder, function.args, kind, 4 * columns, *part)
    builder.ret_void()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple("x86_64-unknown-linux-gnu")
    machine = target.create_target_machine(cpu=cpu, opt=3)
    return machine.emit_assembly(llvm.parse_assembly(str(module)))


def _loops(assembly: str) -> list[str]:
    """What lies between a label and the jump back to it."""
    loop = r"^(\.LBB\d+_\d+):(?=((?:(?!^\.L).*\n)*?)\s+j\w+\s+\1\n)"
    return [match[2] for match in re.finditer(loop, assembly, re.MULTILINE)]
