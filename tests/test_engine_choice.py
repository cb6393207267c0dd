"""--engine auto: what samples fastest, unless a setting is for vLLM."""

from __future__ import annotations

from typing import Any

import pytest

from polymath_fast import rollout
from polymath_fast.config import Config
from polymath_fast.errors import UserError
from polymath_fast.kernels.cpu import tiles
from polymath_fast.run.inputs import read_inputs

SAMPLE = {"question": "2+2?", "answer": "4", "eval_dataset": (), "device": "cpu"}


def chosen(**settings: Any) -> str:
    config = Config(**SAMPLE, **{"model": "random:tiny"} | settings)
    return read_inputs(config, notify=lambda text: None).engine_name


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("settings", "in_tiles", "engine"),
    [
        ({}, True, "transformers"),
        ({}, False, "vllm"),
        ({"tape_gib": 0.1}, True, "transformers"),
        ({"model": "random:tiny-gemma"}, True, "vllm"),
        ({"engine": "vllm"}, True, "vllm"),
        ({"kv_cache_gib": 1.0}, True, "vllm"),
        ({"weight_sync": "alias"}, True, "vllm"),
        ({"reuse_kv_cache": True}, True, "vllm"),
    ],
)
def test_where_vllm_is_installed(settings, in_tiles, engine, monkeypatch):
    monkeypatch.setattr(tiles, "available", lambda dtype: in_tiles)
    assert chosen(**settings) == engine


@pytest.mark.parametrize(("in_tiles", "part"), [(True, "faster than vLLM"), (False, "adds it")])
def test_without_vllm(in_tiles, part, monkeypatch):
    monkeypatch.setattr(rollout, "find_spec", lambda name: None)
    name, reason = rollout.choose_engine("auto", in_tiles=in_tiles)
    assert name == "transformers" and part in reason
    monkeypatch.setattr(tiles, "available", lambda dtype: in_tiles)
    with pytest.raises(UserError, match="--weight-sync alias is for vLLM"):
        chosen(weight_sync="alias")
