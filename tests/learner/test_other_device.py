"""The learner and the embedded sampler on a device that is not the CPU: none of their tensors is
forgotten on the host, and nothing waits for a number before the batch is done.

The device is "meta", which computes shapes and refuses to mix with the CPU, as a GPU would. What
reads numbers back is patched: it has none.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polymath_fast.config import Config
from polymath_fast.learner import passes
from polymath_fast.learner.loss import Divisors, loss_spec
from polymath_fast.learner.metrics import UpdateMetrics
from polymath_fast.learner.packing import TrainingRow
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.step import Learner
from polymath_fast.models import resolve_model
from polymath_fast.rollout.decode import ModuleDecoder, PromptCache, run_decoder
from polymath_fast.rollout.sampling import sample_tokens

IDS = (tuple(range(3, 20)), (*range(3, 18), 40, 41), (9,), (9,))
SETTINGS = {
    "plain": {},
    "remainder": {"beta": 0.1, "master_weights": "remainder"},
    "sequences": {
        "importance_sampling_mode": "sequence_mask",
        "loss_type": "gspo",
        "entropy_coef": 0.01,
        "active_vocabulary": "auto",
    },
    "small micro-batches": {"gradient_checkpointing": True, "prefix_tree": "off"},
}


@pytest.fixture(autouse=True)
def no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast knows no such device, and there are no numbers to bring to the host."""
    autocast, on_cpu = torch.autocast, torch.Tensor.cpu

    def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else on_cpu(tensor)

    def autocast_of(device: str, **options: object) -> object:
        return contextlib.nullcontext() if device == "meta" else autocast(device, **options)

    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    monkeypatch.setattr(torch, "autocast", autocast_of)
    monkeypatch.setattr(torch.Tensor, "cpu", to_cpu)


def policy_of(family: str, **options: object) -> Policy:
    folder: Path = resolve_model(f"random:{family}", notify=lambda text: None)
    return Policy(folder, device="meta", dtype=torch.bfloat16, **options)


def learn(family: str, settings: dict[str, object]) -> UpdateMetrics:
    """An update of four completions."""
    config = Config(learning_rate=1e-3, max_completion_length=20, **settings)
    policy = policy_of(family, gradient_checkpointing=config.gradient_checkpointing)
    rows = [
        TrainingRow(
            prompt_ids=(5, 6, 7),
            token_ids=ids,
            sampling_logprobs=[-1.0] * len(ids),
            advantage=advantage,
            ref_logprobs=[-1.0] * len(ids) if config.beta else None,
        )
        for ids, advantage in zip(IDS, (1.0, -1.0, 0.5, 0.5), strict=True)
    ]
    learner, metrics = Learner(policy, config), UpdateMetrics(config)
    if config.gradient_checkpointing:
        # two of them, so that the prompt is computed apart
        learner.passes.config = replace(config, tokens_per_microbatch=23)
    learner.passes.learn(rows, loss_spec(config, Divisors(tokens=38, completions=4)), metrics, int)
    metrics.add_update(*learner.optimizer.step(1e-3))
    return metrics


@pytest.mark.parametrize("family", ["tiny", "tiny-qwen2", "tiny-qwen3", "tiny-gemma"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_update_leaves_nothing_on_the_host(family: str, settings: dict[str, object]) -> None:
    metrics = learn(family, settings)
    assert metrics._passes["batches"] == (2 if settings.get("gradient_checkpointing") else 1)
    kept = [*metrics._sums.values(), *metrics._maxima.values(), *metrics._updates[0]]
    assert all(tensor.is_meta for tensor in kept)


def test_a_tensor_that_is_left_there_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = passes.pack

    def forgetful(*given: object, **options: object) -> object:
        batch = pack(*given, **options)
        return replace(batch, advantages=torch.zeros(batch.advantages.shape))

    monkeypatch.setattr(passes, "pack", forgetful)
    with pytest.raises((RuntimeError, ValueError), match="meta"):
        learn("tiny", {})


@pytest.mark.parametrize("prompts", [[(1, 2, 3), (4, 5)], [(1, 2, 3)] * 2], ids=["two", "one"])
@torch.inference_mode()
def test_the_sampler_leaves_nothing_on_the_host(prompts: list[tuple[int, ...]]) -> None:
    policy = policy_of("tiny")
    prefilled = []
    for prompt_ids in prompts:
        cache = PromptCache()
        ids = torch.tensor([prompt_ids], device=policy.device)
        places = torch.arange(ids.shape[1], device=policy.device)[None]
        prefilled.append((cache, run_decoder(policy, ids, places, cache)[:, -1]))
    decoder = ModuleDecoder(policy, prefilled)
    uniforms = torch.rand(2, dtype=torch.float64).to(policy.device)
    drawn = sample_tokens(decoder.first(), uniforms, 0.7, 300)
    assert all(tensor.is_meta for tensor in drawn)
    decoder.next(torch.tensor([1, 2]))
    decoder.keep(torch.tensor([1, 0]))
    decoder.next(torch.tensor([1, 2]))
    blocks = decoder.blocks()
    assert blocks.block(torch.tensor([1, 2, 3]), torch.tensor([2, 1])).shape == (3, 320)
    blocks.advance(torch.tensor([1, 1]))
    blocks.keep(torch.tensor([1]))
    assert blocks.block(torch.tensor([1, 2]), torch.tensor([2])).is_meta
