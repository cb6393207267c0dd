"""Estimates of a job's memory on GPUs of known size."""

from __future__ import annotations

from polymath_fast import memory
from polymath_fast.config import Config
from polymath_fast.kernels.triton.budget import Gpu
from polymath_fast.models import random_models

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
}
H100 = Gpu(85_017_493_504, 132, "hopper")
H200 = Gpu(150_754_820_096, 132, "hopper")


def estimate(
    engine: str = "transformers",
    device: str = "cuda",
    dtype: str = "bfloat16",
    family: str = "qwen2.5-1.5b",
    gpu: Gpu = H100,
    **settings: object,
) -> dict:
    return memory.estimate(
        random_models.FAMILIES[family],
        Config(**settings),
        engine=engine,
        prompt_tokens=100,
        device=device,
        dtype=dtype,
        gpu=gpu,
    )


LOGITS = 4 * 120 * 151952
"""bytes: 72 MiB hold 120 rows of Qwen's vocabulary in an odd number of cache lines"""
