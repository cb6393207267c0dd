"""Random models: quick, the same everywhere, of the published shapes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from polymath_fast.models import random_models, resolve_model


@pytest.mark.parametrize(
    ("family", "model_type"),
    [("tiny", "llama"), ("tiny-qwen2", "qwen2"), ("tiny-qwen3", "qwen3"), ("tiny-gemma", "gemma")],
)
def test_tiny_families_are_quick_and_say_something(
    family: str, model_type: str, own_cache: Path
) -> None:
    start = time.perf_counter()
    folder = resolve_model(f"random:{family}")
    assert time.perf_counter() - start < 20, "about 0.1 s when the machine is idle"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (model.config.model_type, model.dtype) == (model_type, torch.float32)
    assert (
        model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    )
    assert len(tokenizer) == model.config.vocab_size
    text = "What is 3 * 4? \u00e9\u4f60"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) == len(text.encode())
    logprobs = model(torch.tensor([ids])).logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    uniform = torch.tensor(model.config.vocab_size).log()
    assert 0.5 * uniform < entropy.mean() < 0.95 * uniform
    assert all(parameter.std() > 0 for parameter in model.parameters()), "no constant weights"
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_random_weights_are_the_same_everywhere(
    tiny_model: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1234)
    before = torch.random.get_rng_state()
    again = resolve_model("random:tiny")
    assert again.parent == own_cache and again != tiny_model
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random state is kept"
    first, second = (load_file(folder / "model.safetensors") for folder in (tiny_model, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_whoever_may_read_a_random_model_s_config_may_read_its_weights(
    tmp_path: Path, mask: int
) -> None:
    before = os.umask(mask)
    try:
        random_models.build(random_models.FAMILIES["tiny"], tmp_path, "float32")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"] == 0o666 & ~mask


def test_random_from_a_config_file(copy: Path, own_cache: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "quantization_config": {"quant_method": "gptq"}}
    (copy / "config.json").write_text(json.dumps(config))
    for name in (str(copy), str(copy / "config.json")):
        folder = resolve_model(f"random:{name}")
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.num_hidden_layers == 1 and model.dtype == torch.bfloat16


# Parameters as published with the models; the vocabulary counts once where the head is tied.
@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        ("smollm2-135m", 134_515_008),
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
    ],
)
def test_shapes_are_those_of_the_published_models(family: str, parameters: int) -> None:
    config = random_models.config_of(random_models.FAMILIES[family])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
