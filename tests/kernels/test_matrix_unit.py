"""The matrix unit (AMX): its instructions on any processor, its sums where there is one."""

from __future__ import annotations

import re

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from llvmlite import ir
from numba import njit

from polymath_fast.kernels.cpu import blocks, matrix_unit, panel_blocks, products
from polymath_fast.kernels.cpu.moves import turn_pairs
from polymath_fast.kernels.cpu.operands import bits, words

needs_unit = pytest.mark.skipif(not matrix_unit.available(), reason="needs AMX")


@njit
def _block(a, b, out, count, add):
    before = np.empty(blocks.SAVED, np.uint8)
    blocks.begin(b, before)
    place, step = out.ctypes.data, out.strides[0]
    later = blocks.later(b.ctypes.data, b.shape[0], 0, 1, place)
    blocks.multiply(a.ctypes.data, a.strides[0], b, b.shape[0], place, step, count, add, later)
    blocks.end(b, before)
    return blocks.rows_of(b)


@njit
def _panel(a, b, out, count, add):
    before = np.empty(blocks.SAVED, np.uint8)
    blocks.begin(b, before)
    place, step = out.ctypes.data, out.strides[0]
    panel_blocks.multiply(a.ctypes.data, a.strides[0], b, b.shape[0], place, step, add)
    blocks.end(b, before)
    return panel_blocks.rows_of(b)


def _factors(rows: int, depth: int, columns: int):
    """Random bf16 factors, the right one packed as pairs, and their product."""
    generator = torch.Generator().manual_seed(depth)
    left = torch.randn(rows, depth, generator=generator).bfloat16()
    right = torch.randn(depth, columns, generator=generator).bfloat16()
    packed = right.view(-1, 2, columns).transpose(1, 2).reshape(-1, 2 * columns).contiguous()
    return words(left), words(packed), (left.double() @ right.double()).numpy()


@needs_unit
@pytest.mark.parametrize(
    ("multiply", "columns", "count"),
    [(_block, 48, 3), (_block, 48, 16), (_block, 48, 17), (_block, 48, 32), (_panel, 64, 16)],
)
@pytest.mark.parametrize("depth", [2, 32, 34, 66, 576])
def test_sums_are_those_of_the_factors(multiply, columns, count, depth):
    rows = 16 if count <= 16 else 32
    left, packed, truth = _factors(rows, depth, columns)
    out = np.full((rows, columns + 3), 7, np.float32)  # a step of its own
    assert multiply(left, packed, out, count, False) in (16, 32)
    np.testing.assert_allclose(out[:, :columns], truth, rtol=0, atol=4e-5)
    multiply(left, packed, out, count, True)
    np.testing.assert_allclose(out[:, :columns], 2 * truth, rtol=0, atol=1e-4)
    assert (out[:, columns:] == 7).all()


@needs_unit
@pytest.mark.parametrize("count", [1, 16, 17, 48, 63, 64, 65, 130])
@pytest.mark.parametrize("depth", [16, 32, 64, 96])
def test_only_columns_that_count_are_multiplied(count, depth):
    @njit
    def scores(rows, count, panels, out):
        before = np.empty(blocks.SAVED, np.uint8)
        blocks.begin(panels, before)
        panel_blocks.products(rows, count, panels, out)
        blocks.end(panels, before)

    panels = -(-count // 64)
    left, packed, truth = _factors(16, depth, 64 * panels)
    some = np.ascontiguousarray(packed.reshape(-1, panels, 64).transpose(1, 0, 2))
    out = np.full((16, 64 * panels), 7, np.float32)
    scores(left, count, some, out)
    np.testing.assert_allclose(out[:, :count], truth[:, :count], rtol=0, atol=4e-5)
    if depth % 32 == 0:
        assert (out[:, -(-count // 16) * 16 :] == 7).all()


@needs_unit
def test_rows_of_a_product_do_not_depend_on_how_many_there_are():
    weight, hidden = (torch.randn(n, 34).bfloat16() for n in (100, 70))
    every = torch.empty(70, 100)
    products.TileProducts(weight).logits(hidden, every)
    for count in (1, 15, 16, 17, 31, 32, 33, 49):
        some = torch.empty(count, 100)
        products.TileProducts(weight).logits(hidden[:count], some)
        assert torch.equal(some, every[:count])


@needs_unit
def test_long_sums_are_made_of_shorter_ones():
    """Three chains of 384 pairs: one fp32 sum over all of them would be off by more."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 2304, generator=generator).abs().bfloat16() for n in (32, 480))
    found = torch.empty(32, 480)
    products.TileProducts(weight).logits(hidden, found)
    truth = hidden.double() @ weight.double().t()
    error = ((found - truth) / truth).abs()
    assert error.max() < 4e-7
    assert error.square().mean().sqrt() < 1e-7


@needs_unit
def test_tiles_are_given_back_as_they_were_found():
    @njit
    def nested(first, second, third):
        matrix_unit.configure(first.ctypes.data)
        matrix_unit.configure(second.ctypes.data)
        matrix_unit.restore(second.ctypes.data)
        matrix_unit.configure(third.ctypes.data)
        matrix_unit.restore(third.ctypes.data)
        matrix_unit.restore(first.ctypes.data)

    found = [np.full(64, 255, np.uint8) for _ in range(3)]
    nested(*found)
    again = [np.full(64, 255, np.uint8) for _ in range(3)]
    nested(*again)
    ours = np.frombuffer(bytes(matrix_unit._CONFIG), np.uint8)
    assert (found[1] == ours).all() and (found[2] == ours).all()
    assert (again[0] == found[0]).all()


@needs_unit
def test_torch_s_products_are_the_same_before_and_after():
    left, right = (torch.randn(200, 200).bfloat16() for _ in range(2))
    before = left @ right
    out = torch.empty(200, 200)
    products.TileProducts(right).logits(left, out)
    assert torch.equal(left @ right, before)


def test_pairs_of_rows_become_words_of_columns():
    source = torch.arange(40 * 50, dtype=torch.int16).view(40, 50).view(torch.bfloat16)
    out = np.zeros((16, 20), np.uint32)

    @njit
    def turn(source, out):
        turn_pairs(source[3, 5:].ctypes.data, source.strides[0], out.ctypes.data, out.strides[0])

    turn(bits(source), out)
    numbers = bits(source).astype(np.uint32)[3:35, 5:21]
    np.testing.assert_array_equal(out[:, :16], (numbers[::2] | numbers[1::2] << 16).T)
    assert not out[:, 16:].any()


@pytest.mark.parametrize(("height", "width", "of"), [(1, 3, 3), (2, 3, 3), (1, 4, 4), (1, 2, 4)])
def test_instructions_of_a_block(height, width, of):
    """On every processor: what is emitted is what Sapphire Rapids has."""
    loop = _loop(height, width, of)
    assert len(re.findall("tdpbf16ps", loop)) == height * width
    loads = width + (height if height == 1 else height + (width - 1) * (height - 1))
    assert len(re.findall("tileloadd", loop)) == loads
    assert len(re.findall("prefetch", loop)) in (0, 24)
    assert "(%rsp" not in loop, "a spill"


def _loop(height: int, width: int, of: int) -> str:
    """Assembly from the first to the last product of a block."""
    module = ir.Module()
    whole, flag = ir.IntType(64), ir.IntType(1)
    kind = ir.FunctionType(ir.VoidType(), [whole] * 6 + [flag, ir.ArrayType(whole, 3)])
    function = ir.Function(module, kind, "block")
    builder = ir.IRBuilder(function.append_basic_block())
    matrix_unit._emit_block(builder, height, width, 64 * of, function.args)
    builder.ret_void()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple("x86_64-unknown-linux-gnu")
    machine = target.create_target_machine(cpu="sapphirerapids", opt=3)
    text = machine.emit_assembly(llvm.parse_assembly(str(module)))
    body = text[: text.rindex("tdpbf16ps") + 40]
    start = max(body.rfind(f".LBB0_{n}:", 0, body.index("tdpbf16ps")) for n in range(20))
    return body[start:]
