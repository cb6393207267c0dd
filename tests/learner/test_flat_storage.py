"""Weights in memory that somebody else laid out: any order, with gaps that stay untouched."""

from __future__ import annotations

import pytest
import torch
from small_models import SETTINGS, Model, batches

from polymath_fast.config import Config
from polymath_fast.learner.flat_storage import FlatStorage
from polymath_fast.learner.optimizer import FlatAdamW

PLACES = {"inner": (3, (6, 6)), "scale": (40, (6,)), "table": (46, (11, 6))}
"""an order of its own: gaps of 3, 1 and 8 elements, a vector between two matrices"""
GAPS = [0, 1, 2, 39, *range(112, 120)]


def foreign(dtype: torch.dtype) -> FlatStorage:
    return FlatStorage(torch.full((120,), 7.0, dtype=dtype), PLACES)


def train(model, optimizer, data):
    for x in data:
        model(x.to(optimizer.live.dtype)).backward()
        assert optimizer.step(1e-3)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_does_not_depend_on_the_storage(dtype):
    plain, placed = Model(dtype), Model(dtype)
    ours = FlatAdamW(plain, Config(**SETTINGS))
    storage = foreign(dtype)
    theirs = FlatAdamW(placed, Config(**SETTINGS), storage)
    for model, optimizer in ((plain, ours), (placed, theirs)):
        train(model, optimizer, batches(6))
    for name, tensor in ours.tensors().items():
        # the order in which squares are summed up for the norm may differ by one rounding
        torch.testing.assert_close(theirs.tensors()[name], tensor, rtol=1e-5, atol=1e-7)
    for name, (offset, shape) in PLACES.items():
        parameter = placed.get_parameter(name)
        assert parameter.data_ptr() == storage.live[offset:].data_ptr()
        assert parameter.shape == shape
    assert (storage.live[GAPS] == 7).all()


def test_a_run_resumes_in_another_storage_exactly():
    first, second = Model(torch.bfloat16), Model(torch.bfloat16)
    plain = FlatAdamW(
        first,
        Config(
            **SETTINGS,
        ),
    )
    train(first, plain, batches(4))
    moved = FlatAdamW(second, Config(**SETTINGS), foreign(torch.bfloat16))
    moved.load(plain.tensors(), plain.updates)
    for name, tensor in plain.tensors().items():
        assert torch.equal(moved.tensors()[name], tensor), name
    for (name, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (PLACES | {"scale": (38, (6,))}, "scale lies at 38:44"),
        (PLACES | {"table": (60, (11, 6))}, "table lies at 60:126"),
        (PLACES | {"scale": (-2, (6,))}, "scale lies at -2:4"),
        ({"inner": (0, (6, 6))}, "table is trained but has no place"),
        (PLACES | {"inner": (3, (36,))}, "inner is"),
    ],
)
def test_places_that_cannot_be_are_refused(places, message):
    with pytest.raises(ValueError, match=message):
        FlatStorage(torch.zeros(120), places).adopt(Model(torch.float32))


def test_tensors_that_are_not_flat_are_refused():
    with pytest.raises(ValueError, match="one contiguous dimension"):
        FlatStorage(torch.zeros(240)[::2], PLACES)
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        foreign(torch.float32).adopt(Model(torch.bfloat16))
