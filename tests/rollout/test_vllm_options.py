"""What vLLM is started with, without starting it."""

from __future__ import annotations

from pathlib import Path

import pytest

from polymath_fast.rollout import max_num_seqs
from polymath_fast.rollout.vllm_options import engine_options


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
