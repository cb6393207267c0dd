"""Inputs in memory of any layout give what contiguous ones give."""

from __future__ import annotations

import pytest
import torch
from operator_inputs import (
    BF16,
    FP16,
    FP32,
    FP64,
    ROWS,
    call,
    gradient,
    impls,
    losses,
    main_input,
    make,
    operators,
)
from torch import Tensor
from torch.testing import assert_close


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """Views of the same values."""
    flat = torch.cat([tensor.new_zeros(1), tensor.flatten()])
    wide = torch.stack([tensor, tensor], -1)
    return {
        "transposed": tensor.t().contiguous().t(),
        "every other": wide.flatten(-2)[..., ::2],
        "odd address": flat[1:].view(tensor.shape),
        "rows apart": torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]],
    }


@operators
@impls
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64])
def test_memory_layouts(op: str, impl: str, dtype: torch.dtype) -> None:
    if impl == "cpu" and dtype == FP64:
        with pytest.raises(ValueError, match="float64"):
            call(op, make(op, dtype=dtype), impl=impl)
        return
    given, name = make(op, dtype=dtype), main_input(op)
    expected = gradient(op, given, impl=impl)
    for layout, view in layouts(given[name]).items():
        assert torch.equal(view, given[name])
        found = gradient(op, {**given, name: view}, impl=impl)
        # the reference hands strides on to torch, which may add up in another order
        spread = 1e-9 if dtype == FP64 else 0.0
        for ours, truth in zip(found, expected, strict=True):
            assert_close(ours, truth, rtol=spread, atol=spread, msg=layout)


@operators
@impls
def test_rows_that_share_memory(op: str, impl: str) -> None:
    given, name = make(op), main_input(op)
    shared = given[name][:1].expand(ROWS, -1)
    found = gradient(op, {**given, name: shared}, impl=impl)
    expected = gradient(op, {**given, name: shared.contiguous()}, impl=impl)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    one = given["targets"][:1].expand(ROWS)
    found = gradient(op, {**given, "targets": one}, impl=impl)
    expected = gradient(op, {**given, "targets": one.contiguous()}, impl=impl)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@losses
@impls
def test_side_inputs_of_any_layout_and_dtype(op: str, impl: str) -> None:
    given = make(op)
    old = -torch.rand(ROWS)
    mask = torch.arange(ROWS) % 2 == 0
    plain = {
        **given,
        "old_logprobs": old,
        "mask": mask,
        "importance_weights": torch.full((2,), 0.7),
    }
    odd = {
        **given,
        "old_logprobs": torch.stack([old, old], 1)[:, 0].double(),
        "mask": torch.stack([mask, mask], 1)[:, 0],
        "importance_weights": torch.tensor(0.7).expand(2),
        "advantages": torch.stack([given["advantages"]] * 2, 1)[:, 1].double(),
        "cu_seqlens": torch.stack([given["cu_seqlens"]] * 2, 1)[:, 1].long(),
        "targets": given["targets"].int(),
    }
    results = [gradient(op, inputs, impl=impl) for inputs in (plain, odd)]
    for ours, truth in zip(*results, strict=True):
        assert_close(ours, truth, rtol=1e-6, atol=1e-8)
