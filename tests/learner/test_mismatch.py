"""Sampler against learner: the metrics by hand, and corrections that cost no second pass."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from closeness import relative_error

from polymath_fast.config import Config
from polymath_fast.kernels import linear_logprobs
from polymath_fast.learner.mismatch import Mismatch, means
from polymath_fast.learner.packing import TrainingRow, pack
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.step import Learner

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
LEARNER = torch.tensor([-1.0, -2.0, -0.5, -3.0])
SAMPLER = torch.tensor([-1.0, -1.0, -1.0, -3.0 - math.log(3)])
CU_SEQLENS = torch.tensor([0, 3, 4], dtype=torch.int32)
PROMPT = (5, 9, 17, 33, 70)


def figures(parts=((0, 4),), **settings):
    mismatch = Mismatch(Config(**settings))
    for start, end in parts:
        ends = CU_SEQLENS.clone()
        inside = ends[(ends >= start) & (ends <= end)] - start
        mismatch.add(LEARNER[start:end], SAMPLER[start:end], inside)
    return found_by(mismatch)


def found_by(mismatch):
    return means(mismatch.sums()) | {"sampling/logprob_diff_max": mismatch.largest()}


def test_figures_by_hand():
    log_ratio = [0.0, -1.0, 0.5, math.log(3)]
    ratio = [math.exp(x) for x in log_ratio]
    found = figures()
    assert found["sampling/logprob_diff_mean"] == pytest.approx((1.5 + math.log(3)) / 4)
    assert found["sampling/logprob_diff_max"] == pytest.approx(math.log(3))
    assert found["sampling/kl_k1"] == pytest.approx(-sum(log_ratio) / 4)
    assert found["sampling/kl_k3"] == pytest.approx(
        sum(r - 1 - x for r, x in zip(ratio, log_ratio, strict=True)) / 4
    )
    assert found["sampling/ratio_outside"] == 0.5  # exp(-1) and 3; 1 and exp(0.5) are inside
    expected = sum(ratio) ** 2 / (4 * sum(r * r for r in ratio))
    assert found["sampling/effective_sample_size"] == pytest.approx(expected, rel=1e-5)
    assert "sampling/masked_ratio" not in found and "sampling/truncated_ratio" not in found


@pytest.mark.parametrize("mode", MODES)
def test_any_split_gives_the_same_figures(mode):
    settings = {"importance_sampling_mode": mode, "importance_sampling_clip_max": 2.0}
    assert figures(((0, 3), (3, 4)), **settings) == pytest.approx(figures(**settings))


def test_what_a_correction_changes_is_counted():
    def share(mode, name, **bounds):
        return figures(importance_sampling_mode=mode, **bounds)[f"sampling/{name}"]

    # token ratios: 1, 0.37, 1.65, 3; of the completions: exp(-0.5) = 0.61 and 3
    assert share("token_mask", "masked_ratio", importance_sampling_clip_max=2.0) == 0.25
    both = {"importance_sampling_clip_max": 2.0, "importance_sampling_clip_min": 0.5}
    assert share("token_truncate", "truncated_ratio", **both) == 0.5
    assert share("sequence_mask", "masked_ratio", **both) == 0.25
    both = {"importance_sampling_clip_max": 4.0, "importance_sampling_clip_min": 0.7}
    assert share("sequence_truncate", "truncated_ratio", **both) == 0.75


def test_equal_models_and_a_silent_sampler_have_no_mismatch():
    mismatch = Mismatch(Config())
    mismatch.add(LEARNER, LEARNER, CU_SEQLENS)
    mismatch.add(LEARNER, torch.full((4,), math.nan), CU_SEQLENS)
    found = found_by(mismatch)
    assert found.pop("sampling/effective_sample_size") == 1
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_that_of_weights_from_a_pass_of_their_own(tiny_model, mode):
    """Weights computed beforehand from the learner's log-probs, put into the advantages."""
    generator = torch.Generator().manual_seed(3)
    rows = [
        TrainingRow(
            prompt_ids=PROMPT,
            token_ids=torch.randint(40, 200, (length,), generator=generator).tolist(),
            sampling_logprobs=[0.0] * length,
            advantage=1.0 - 0.7 * length,
        )
        for length in (5, 1, 3)
    ]
    policy = Policy(tiny_model, dtype=torch.float32)
    batch = pack(rows)
    with torch.no_grad():
        logprobs, _ = linear_logprobs(policy.hidden(batch), policy.head.weight, batch.targets)
    noise = torch.tensor([0.3, -0.2, 0.9, 0.1, -0.2, -1.0, 0.1, -0.3, 0.4])
    parts = (logprobs - noise).split([5, 1, 3])
    rows = [replace(r, sampling_logprobs=p.tolist()) for r, p in zip(rows, parts, strict=True)]
    sums = [part.sum().expand_as(part) for part in noise.split([5, 1, 3])]
    weights = (noise if mode.startswith("token") else torch.cat(sums)).exp()
    low, high = 0.6, 1.8
    assert (weights > high).any() and (weights < low).any()
    if mode.endswith("truncate"):
        weights = weights.clamp(low, high)
    else:
        weights = torch.where((weights < low) | (weights > high), 0, weights)
    learner = Learner(
        policy,
        Config(
            loss_type="grpo",
            importance_sampling_mode=mode,
            importance_sampling_clip_max=high,
            importance_sampling_clip_min=low,
        ),
    )
    seen = {}
    learner.optimizer.step = lambda rate: (
        seen.update(g=learner.optimizer.grad.clone()),
        (1.0, True),
    )[1]
    passes = []
    policy.hidden = lambda *args: (passes.append(1), Policy.hidden(policy, *args))[1]
    learner.update(rows, 0)
    assert len(passes) == 1
    learner.optimizer.zero_grad()
    lengths = batch.cu_seqlens.diff().long()
    advantages = batch.advantages.repeat_interleave(lengths) / lengths.repeat_interleave(lengths)
    logits = policy.head(Policy.hidden(policy, batch))
    chosen = logits.log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
    (-(weights * advantages * chosen).sum() / len(rows)).backward()
    expected = learner.optimizer.grad
    assert relative_error(seen["g"], expected) < 1e-5
