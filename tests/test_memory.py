"""Parts of the memory estimate follow the settings, the device and the engine."""

from __future__ import annotations

import pytest
import torch
from memory_estimates import H100, H200, LOGITS, PUBLISHED, estimate

from polymath_fast import memory
from polymath_fast.config import Config
from polymath_fast.kernels.cpu import tiles
from polymath_fast.kernels.triton.budget import chunk_rows, head_bytes
from polymath_fast.models import random_models
from polymath_fast.precision import torch_dtype
from polymath_fast.rollout.tape_room import row_bytes


def test_parts_follow_the_settings() -> None:
    plain = estimate()
    gib = PUBLISHED["qwen2.5-1.5b"] / 2**30
    assert plain["weights (bf16)"] == pytest.approx(2 * gib)
    assert plain["AdamW moments (fp32)"] == pytest.approx(8 * gib)
    half = estimate(master_weights="remainder")
    assert sum(half.values()) == pytest.approx(sum(plain.values()) - 2 * gib)
    assert half["remainder of master weights (int16)"] == pytest.approx(2 * gib)
    away = estimate(offload_optimizer=True)
    assert sum(away.values()) == pytest.approx(sum(plain.values()) - 12 * gib)
    assert away["gradient (fp32)"] == plain["gradient (fp32)"] == pytest.approx(4 * gib)
    processes = {"num_processes": 8, "master_weights": "remainder"}
    replicated, shared = (estimate(**processes, shard_optimizer=on) for on in (False, True))
    assert sum(shared.values()) == pytest.approx(sum(replicated.values()) - 7 / 8 * 10 * gib)
    assert shared["AdamW moments (fp32)"] == pytest.approx(gib)
    assert shared["gradient (fp32)"] == pytest.approx(4 * gib)
    assert sum(estimate(beta=0.1).values()) == pytest.approx(sum(plain.values()) + 2 * gib)
    assert estimate("vllm", kv_cache_gib=7.0)["KV cache"] == 7
    tokens = 256 * 1024 + 100  # as many as decode together, at full length
    needed = tokens * memory.kv_cache_bytes(random_models.FAMILIES["qwen2.5-1.5b"]) / 2**30
    assert needed < estimate("vllm")["KV cache"] < 1.1 * needed
    assert estimate("vllm", device="cpu")["KV cache"] == 1
    assert estimate("vllm", device="cpu", kv_cache_gib=1.5)["KV cache"] == 2  # as vLLM takes it
    assert "sampler's weights (bf16)" not in plain | estimate("vllm")
    for options in ({"device": "cpu"}, {"weight_sync": "copy"}):
        assert estimate("vllm", **options)["sampler's weights (bf16)"] == pytest.approx(2 * gib)
    assert "libraries" in estimate(device="cpu") and "libraries" not in plain
    halved = estimate(tokens_per_microbatch=8192)
    assert halved["activations of 8192 tokens"] == pytest.approx(
        plain["activations of 16384 tokens"] / 2
    )


def test_a_tape_takes_the_place_of_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "available", lambda dtype: True)
    settings = {"family": "smollm2-135m", "num_generations": 8, "max_completion_length": 129}
    settings |= {"groups_per_step": 2, "tokens_per_microbatch": 4096}
    shape, dtype = random_models.FAMILIES["smollm2-135m"], torch_dtype("bfloat16")
    layers = 30 * (2 * (4 * 576 + 2 * 192 + 2 * 1536) + 4 * 9) + 2 * 576
    assert row_bytes(shape, Config(entropy_coef=0.1), dtype) == layers
    row = row_bytes(shape, Config(), dtype)
    assert row == layers + 2 * (49152 + 32)
    plain = estimate("transformers", "cpu", tape_gib=0, **settings)
    taped = estimate("transformers", "cpu", tape_gib=2, **settings)
    assert taped["tape of 2064 tokens"] == pytest.approx(2064 * row / 2**30)
    activations = "activations of 2164 tokens"  # 16 completions and their prompt of 100
    assert taped[activations] < plain[activations] / 8
    some = estimate("transformers", "cpu", tape_gib=0.25, **settings)
    held = int(0.25 * 2**30) // row
    assert some[f"tape of {held} tokens"] <= 0.25 and some[activations] == plain[activations]
    for options in ({"engine": "vllm"}, {"device": "cuda"}, {"updates_per_batch": 2}):
        others = estimate(**{"engine": "transformers", "device": "cpu", **settings, **options})
        assert not any(name.startswith("tape") for name in others), options


def test_scratch_memory_in_the_cache_is_not_counted_twice() -> None:
    gib = 2**30
    vocabulary, hidden = 151936, 1536
    sums = 4 * vocabulary * hidden / gib
    logits = {
        "bfloat16": (LOGITS + 2 * 592 * 151968) / gib,
        "float32": (LOGITS + 4 * 288 * 151952) / gib,
    }
    chunks = {
        dtype: chunk_rows(16384, vocabulary, hidden, torch_dtype(dtype), H100) * vocabulary / gib
        for dtype in ("bfloat16", "float32")
    }
    for device, dtype, spared in (
        ("cpu", "bfloat16", logits["bfloat16"] + sums),
        ("cpu", "float32", logits["float32"]),
        ("cuda", "bfloat16", 2 * chunks["bfloat16"] + sums),
        ("cuda", "float32", 4 * chunks["float32"]),  # there the sum is the gradient itself
    ):
        plain = estimate("vllm", device, dtype, kv_cache_gib=8.0)
        reused = estimate("vllm", device, dtype, kv_cache_gib=8.0, reuse_kv_cache=True)
        assert sum(plain.values()) - sum(reused.values()) == pytest.approx(spared)
        assert plain["LM head"] - reused["LM head"] == pytest.approx(spared)
        assert reused["LM head"] > 0


def test_scratch_memory_lies_in_one_piece_of_the_cache() -> None:
    """Vocabulary sums of 0.87 GiB, gradient rows and logits, in a cache of 2 GiB."""

    def spared(storages: int) -> float:
        parts = (
            memory.estimate(
                random_models.FAMILIES["qwen2.5-1.5b"],
                Config(kv_cache_gib=2.0, reuse_kv_cache=reuse),
                engine="vllm",
                prompt_tokens=100,
                device="cpu",
                kv_storages=storages,
            )["LM head"]
            for reuse in (False, True)
        )
        return next(parts) - next(parts)

    sums = 4 * 151936 * 1536 / 2**30
    logits, slopes = LOGITS / 2**30, 2 * 592 * 151968 / 2**30
    assert spared(1) == pytest.approx(logits + slopes + sums)
    assert spared(4) == pytest.approx(logits + slopes)
    assert spared(28) == pytest.approx(logits)
    assert spared(30) == 0


def test_float32_weights_are_twice_as_long_and_their_own_master() -> None:
    gib = PUBLISHED["qwen2.5-1.5b"] / 2**30
    parts = estimate("vllm", device="cpu", dtype="float32", beta=0.1)
    for name in ("weights (fp32)", "reference model (fp32)", "sampler's weights (fp32)"):
        assert parts[name] == pytest.approx(4 * gib)
    assert not [name for name in parts if "master" in name or "bf16" in name]


@pytest.mark.parametrize("family", ["qwen2.5-1.5b", "qwen2.5-7b"])
def test_the_head_on_a_gpu_is_counted_as_the_kernel_cuts_it(family: str) -> None:
    shape = random_models.FAMILIES[family]
    size = (16_384, shape["vocab_size"], shape["hidden_size"], torch.bfloat16)
    for gpu in (H100, H200):
        found = estimate(family=family, gpu=gpu)["LM head"]
        assert found * 2**30 == head_bytes(*size, gpu)
        # the fp32 gradient of the weight, and a chunk of a 64th of the device beside it
        assert found * 2**30 > 4 * size[1] * size[2] + 0.5 * gpu.memory / 64
        some = estimate(family=family, gpu=gpu, active_vocabulary="auto")["LM head"]
        assert some * 2**30 == head_bytes(*size, gpu, some_columns=True)
    on_cpu = estimate("vllm", device="cpu", family=family)["LM head"]
    blocks = LOGITS + 2 * 592 * 151968
    if family != "qwen2.5-1.5b":  # 152064 columns, a few more cache lines
        blocks = 4 * 120 * 152080 + 2 * 592 * 152096
    assert on_cpu * 2**30 == blocks + 8 * size[1] * size[2]


def test_a_small_batch_needs_no_more_than_its_tokens() -> None:
    small = {"num_generations": 2, "groups_per_step": 1, "max_completion_length": 50}
    assert "activations of 200 tokens" in estimate(**small)


def test_the_embedded_sampler_counts_where_it_needs_more_than_learning() -> None:
    long = estimate(device="cpu", max_completion_length=2048, num_generations=256)
    assert "KV cache" in long
    assert not [name for name in long if name.startswith(("activations", "LM head"))]
    few = estimate(device="cpu", max_completion_length=3000, num_generations=2)
    assert {"LM head", "activations of 3100 tokens"} <= few.keys() and "KV cache" not in few


def test_on_a_cpu_fewer_tokens_go_through_the_model_at_once() -> None:
    assert "activations of 16384 tokens" in estimate(device="cuda")
    assert "activations of 2048 tokens" in estimate("vllm", device="cpu", max_completion_length=512)
    assert "activations of 3172 tokens" in estimate(
        "vllm", device="cpu", max_completion_length=3072
    )
