"""Weights in shared memory that an engine behind a socket reads."""

from __future__ import annotations

import pytest
import torch
from served_engine import SAMPLING, Running, small_model

from polymath_fast.errors import EngineError


def test_an_engine_that_wakes_finds_the_memory_that_an_update_left(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's allocator keeps it in this process, where the other one cannot ask for it."""
    engine, emptied = running.start(), []
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: emptied.append(running.engines[0].asleep)
    )
    engine.sleep()
    engine.wake()
    assert not emptied
    engine._shares_gpu = True
    engine.sleep()
    engine.wake()
    engine.generate([7], 1, SAMPLING)
    assert emptied == [True, False]


def test_weights_are_read_where_the_learner_writes_them(running: Running) -> None:
    engine, model = running.start(), small_model()
    before = model[0].weight.detach().clone()
    storage = engine.weights.attach(model)
    assert model[0].weight is model[1].weight and torch.equal(model[0].weight, before)
    assert model[0].weight.data_ptr() == storage.live.data_ptr()
    for version in (1, 2):
        storage.live.mul_(2)
        engine.weights.push(model.named_parameters(remove_duplicate=False), version)
        copy = running.engines[0].copy
        assert copy.keys() == {"0.weight", "1.weight"}
        assert all(torch.equal(weight, before * 2**version) for weight in copy.values())
        assert engine.generate([1], 1, SAMPLING)[0].weight_version == version
    engine.weights.verify(model.named_parameters())
    assert engine.weights.version == 2
    model[0].weight.data = before
    with pytest.raises(EngineError, match="0.weight of the learner no longer lies"):
        engine.weights.push(model.named_parameters(), 3)


def test_a_corrupted_weight_is_found(running: Running) -> None:
    engine, model = running.start(), small_model()
    engine.weights.attach(model)
    engine.weights.push(model.named_parameters(), 1)
    running.engines[0].copy["0.weight"].view(torch.int16)[3, 3] ^= 1
    with pytest.raises(EngineError, match="the other process failed: 0.weight differs"):
        engine.weights.verify(model.named_parameters())
