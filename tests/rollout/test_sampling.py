"""The sampler draws from the distribution it reports."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from polymath_fast.rollout.sampling import sample_tokens


def uniforms(count, seed=0):
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocab", [5, 256, 300, 1000])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_frequencies_follow_the_softmax(vocab, temperature):
    draws = 40_000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    tokens, _ = sample_tokens(logits.expand(draws, -1), uniforms(draws), temperature)
    probs = (logits.double() / temperature).softmax(-1)
    counts = torch.bincount(tokens, minlength=vocab).double()
    # 5 standard deviations of a binomial count, for the largest deviation of up to 1000 counts
    assert ((counts - draws * probs).abs() < 5 * (draws * probs * (1 - probs)).sqrt() + 5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logprobs_are_those_of_the_scaled_distribution(dtype):
    logits = torch.randn(64, 777).to(dtype)
    tokens, logprobs = sample_tokens(logits, uniforms(64), 0.7)
    truth = (logits.double() / 0.7).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), truth, atol=2e-6, rtol=0)
    assert (logprobs <= 0).all()


def test_greedy_takes_the_largest_and_needs_no_uniforms():
    logits = torch.randn(9, 500)
    tokens, logprobs = sample_tokens(logits, torch.full((9,), float("nan")), 0.0)
    assert torch.equal(tokens, logits.argmax(-1))
    truth = logits.double().log_softmax(-1).max(-1).values
    torch.testing.assert_close(logprobs.double(), truth, atol=2e-6, rtol=0)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_never_draw_the_impossible(u):
    logits = torch.full((1, 600), float("-inf"))
    logits[0, [3, 299, 520]] = torch.tensor([1.0, 2.0, 0.5])
    tokens, logprobs = sample_tokens(logits, torch.tensor([u], dtype=torch.float64), 1.0)
    assert tokens.item() in (3, 299, 520)
    assert logprobs.isfinite().all()


_DRAW = """
import torch
from polymath_fast.kernels.cpu.recorded_head import Recording
from polymath_fast.rollout.sampling import sample_tokens

generator = torch.Generator().manual_seed(0)
logits = 4 * torch.randn(16, 20_000, generator=generator)
found = torch.empty(16, 4, dtype=torch.float64)
places = torch.arange(16)
recording = Recording(torch.empty(16, 20_000), -torch.ones_like(places), places, found)
uniforms = torch.rand(16, dtype=torch.float64, generator=generator)
sample_tokens(logits, uniforms, 0.6, None, recording)
print(found.sum(0).tolist(), flush=True)
"""


def test_a_process_that_compiles_finds_the_bits_of_one_that_loads(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    found = [
        subprocess.run(
            [sys.executable, "-c", _DRAW],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        ).stdout
        for _ in range(2)
    ]
    assert found[0] == found[1] != ""
    assert any(tmp_path.rglob("draw.draw*.nbc"))
