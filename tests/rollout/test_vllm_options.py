"""What vLLM is started with, without starting it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polymath_fast.rollout import max_num_seqs
from polymath_fast.rollout.vllm_options import engine_options, kv_cache_options


def options(device, sequences):
    return engine_options(
        Path("model"),
        dtype="bfloat16",
        max_model_len=4096,
        max_num_seqs=sequences,
        device=device,
        seed=3,
    )


@pytest.mark.parametrize(
    ("sequences", "largest"), [(64, None), (512, None), (513, 528), (1000, 1008), (1024, 1024)]
)
def test_cuda_graphs_hold_every_completion_that_decodes_together(sequences, largest):
    found = options("cuda", sequences)
    assert found["max_num_seqs"] == sequences and not found["enforce_eager"]
    assert found.get("max_cudagraph_capture_size") == largest


def test_a_cpu_has_no_graphs():
    found = options("cpu", 1024)
    assert found["enforce_eager"] and "max_cudagraph_capture_size" not in found


@pytest.mark.parametrize("free", [80, 30, 0.5], ids=["all of it", "a part", "hardly any"])
def test_vllm_never_wants_more_of_a_gpu_than_others_leave(free, monkeypatch):
    """It does not start where its share of the whole device is more than is free of it."""
    memory = {0: (int(free * 2**30), 80 * 2**30)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory.__getitem__)
    found = kv_cache_options(2.5)
    wanted = found.pop("gpu_memory_utilization") * 80
    assert found == {"kv_cache_memory_bytes": 2_684_354_560}
    assert type(found["kv_cache_memory_bytes"]) is int
    assert 0.8 * free < wanted < 0.95 * free  # something is left for what others take meanwhile


@pytest.mark.parametrize(
    ("completions", "engine", "device", "together"),
    [
        (2048, "vllm", "cuda", 1024),
        (640, "vllm", "cuda", 640),
        (2048, "vllm", "cpu", 256),
        (2048, "transformers", "cuda", 256),
        (12, "transformers", "cpu", 12),
    ],
)
def test_how_many_decode_together(completions, engine, device, together):
    assert max_num_seqs(completions, engine, device) == together


@pytest.mark.vllm
def test_vllm_knows_every_option():
    from dataclasses import fields

    from vllm.engine.arg_utils import EngineArgs

    assert set(options("cuda", 1024)) <= {field.name for field in fields(EngineArgs)}
