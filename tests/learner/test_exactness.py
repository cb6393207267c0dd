"""Whatever the learner leaves out or shares, its update is that of the plain padded pass."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import padded
import pytest
import torch

from polymath_fast.config import Config
from polymath_fast.config.settings import LossType
from polymath_fast.learner.loss import Divisors, loss_spec
from polymath_fast.learner.metrics import UpdateMetrics
from polymath_fast.learner.packing import TrainingRow, pack
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.rows import training_rows
from polymath_fast.learner.step import Learner
from polymath_fast.models import resolve_model
from polymath_fast.rollout.types import Completion, Group, RolloutBatch
from polymath_fast.samples import Sample

PROMPTS = [(5, 9, 17, 33, 70), (8, 21)]
LOSS_TYPES = get_args(LossType)


def make(prompt, length, advantage, seed, trained=True):
    generator = torch.Generator().manual_seed(seed)
    return TrainingRow(
        prompt_ids=prompt,
        token_ids=torch.randint(40, 60, (length,), generator=generator).tolist(),
        sampling_logprobs=(-5 - torch.rand(length, generator=generator)).tolist(),
        advantage=advantage,
        trained=trained,
    )


def some_rows():
    """Two prompts, alternating; duplicates, a common beginning, zero advantages, one that is masked
    out, lengths from 1 to 11."""
    rows = []
    for prompt in PROMPTS:
        first = make(prompt, 7, 1.5, seed=1)
        rows += [
            first,
            make(prompt, 1, -0.5, seed=2),
            make(prompt, 11, 0.0, seed=3),
            first,
            make(prompt, 4, -1.0, seed=4),
            make(prompt, 4, -1.0, seed=4),
            make(prompt, 5, 2.0, seed=5, trained=False),
            make(prompt, 9, -0.7, seed=6),
        ]
    rows.append(TrainingRow(**{**vars(first), "token_ids": [*first.token_ids[:-1], 61]}))
    rows.append(TrainingRow(**{**vars(first), "advantage": -0.25}))
    return rows[::2] + rows[1::2]


def update(folder, rows, settings):
    """Metrics and flat gradient of one update, before it is clipped and applied."""
    learner = Learner(Policy(folder, dtype=torch.float32), settings)
    seen = {}
    step = learner.optimizer.step
    learner.optimizer.step = lambda rate: (
        seen.update(g=learner.optimizer.grad.clone()), step(0.0),
    )[1]  # fmt: skip
    metrics = learner.update(rows, 0)
    return learner, metrics, seen["g"]


@pytest.mark.parametrize("tokens", [14, 40, 16384])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_every_gradient_equal_the_padded_pass(tiny_model, loss_type, tokens):
    settings = Config(
        loss_type=loss_type,
        epsilon_high=5.0 if loss_type == "cispo" else None,
        temperature=0.8,
        max_completion_length=12,
        tokens_per_microbatch=tokens,
    )
    rows = some_rows()
    loss, truth, _ = padded.update(tiny_model, rows, settings)
    learner, metrics, gradient = update(tiny_model, rows, settings)
    padded.assert_gradient(learner, gradient, truth)
    assert metrics["policy/loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_with_an_entropy_bonus_and_a_correction(tiny_model, mode):
    """With a bonus every trained row enters the model, so metrics are over all of them."""
    settings = Config(
        entropy_coef=0.01,
        importance_sampling_mode=mode,
        importance_sampling_clip_max=1.1,
        max_completion_length=12,
        tokens_per_microbatch=20,
    )
    rows = [row for row in some_rows() if row.trained]
    loss, truth, found = padded.update(tiny_model, rows, settings)
    learner, metrics, gradient = update(tiny_model, rows, settings)
    padded.assert_gradient(learner, gradient, truth)
    assert metrics["policy/loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["policy/entropy"] == pytest.approx(float(found["entropy"]), rel=1e-5)
    for name in ("sampling/logprob_diff_mean", "sampling/logprob_diff_max"):
        assert metrics[name] == pytest.approx(float(found[name]), rel=1e-4)


def test_duplicates_of_several_updates(tiny_model):
    """Old log-probs are computed once for all copies, and reach each of them."""
    learner = Learner(Policy(tiny_model, dtype=torch.float32), Config(updates_per_batch=2))
    rows = some_rows()
    filled = learner.passes.with_logprobs(rows, "old_logprobs")
    with torch.no_grad():
        expected, _ = padded.token_logprobs(padded.load(tiny_model), rows, 1.0)
    assert [row.token_ids for row in filled] == [row.token_ids for row in rows]
    found = torch.tensor([x for row in filled for x in row.old_logprobs])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["tiny", "tiny-qwen2", "tiny-qwen3"])
def test_a_split_prompt_is_computed_once_forward_and_backward(family):
    folder = resolve_model(f"random:{family}", notify=lambda text: None)
    settings = Config(tokens_per_microbatch=20, max_completion_length=12, beta=0.05)
    rows = [replace(row, ref_logprobs=[-6.0] * len(row.token_ids)) for row in some_rows()]
    learner = Learner(Policy(folder, dtype=torch.float32), settings)
    entered, gradient = [], learner.optimizer.grad
    learner.policy.model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: entered.append(args[0][0].tolist())
    )
    trained = [row for row in rows if row.trained]
    trained_tokens = sum(len(row.token_ids) for row in trained)
    spec = loss_spec(settings, Divisors(trained_tokens, len(rows)))
    learner.passes.learn(trained, spec, UpdateMetrics(settings), int)
    _, truth, _ = padded.update(folder, rows, settings)
    padded.assert_gradient(learner, gradient, truth)
    assert len(entered) > 4
    for prompt in PROMPTS:
        assert sum(ids[: len(prompt)] == list(prompt) for ids in entered) == 1


@pytest.mark.parametrize("tokens", [20, 16384], ids=["split prompt", "whole"])
def test_checkpointing_changes_nothing_but_memory(tiny_model, tokens):
    settings = Config(tokens_per_microbatch=tokens, max_completion_length=12)
    _, _, expected = update(tiny_model, some_rows(), settings)
    policy = Policy(tiny_model, dtype=torch.float32, gradient_checkpointing=True)
    learner = Learner(policy, settings)
    seen, entered = {}, []
    layer = policy.model.get_decoder().layers[0]
    inside = layer.forward
    layer.forward = lambda *args, **named: (entered.append(1), inside(*args, **named))[1]
    learner.optimizer.step = lambda rate: (
        seen.update(g=learner.optimizer.grad.clone()), (1.0, True),
    )[1]  # fmt: skip
    learner.update(some_rows(), 0)
    assert torch.equal(seen["g"], expected)
    assert not any(module.training for module in policy.model.modules())
    batch = pack(some_rows()[:2])
    entered.clear()
    policy.hidden(batch).sum().backward()
    assert len(entered) == 2  # forward, and again for the backward pass
    with torch.no_grad():
        policy.hidden(batch)
    assert len(entered) == 3


def test_a_thousand_identical_completions_cost_one(tiny_model):
    rows = [make(PROMPTS[0], 6, 1.0, seed=1)] * 1023 + [make(PROMPTS[0], 3, -4.0, seed=2)]
    settings = Config(max_completion_length=12)
    learner, metrics, gradient = update(tiny_model, rows, settings)
    pair = [rows[0], rows[-1]]
    weighted = [
        TrainingRow(**{**vars(row), "advantage": row.advantage * count * 9 / (1023 * 6 + 3)})
        for row, count in zip(pair, (1023, 1), strict=True)
    ]
    _, truth, _ = padded.update(tiny_model, weighted, settings)
    padded.assert_gradient(learner, gradient, truth)
    assert metrics["packing/duplicate_token_ratio"] == pytest.approx(1 - 7 / (1023 * 5 + 2))


AWKWARD = {
    "one token each": [(1, 1.0), (1, -1.0), (1, 0.5)],
    "one completion": [(6, 1.0)],
    "ragged from 1 to the maximum": [(n, (-1.0) ** n) for n in range(1, 13)],
    "empty ones between": [(0, 1.0), (4, -1.0), (0, 2.0)],
}


@pytest.mark.parametrize("prompt", [(7,), PROMPTS[0]], ids=["one token", "five tokens"])
@pytest.mark.parametrize("tokens", [13, 16384])
@pytest.mark.parametrize("shapes", AWKWARD.values(), ids=list(AWKWARD))
def test_awkward_shapes(tiny_model, shapes, tokens, prompt):
    settings = Config(
        loss_type="grpo", max_completion_length=12, tokens_per_microbatch=tokens + len(prompt)
    )
    group = Group(
        sample=Sample("q", "a", "q", prompt),
        completions=[
            Completion(
                token_ids=make(prompt, length, 0.0, seed=length).token_ids,
                sampling_logprobs=[-5.0] * length,
                finish_reason="stop",
                weight_version=0,
            )
            for length, _ in shapes
        ],
    )
    advantages = [advantage for _, advantage in shapes]
    rows = training_rows(
        RolloutBatch(groups=[group]), [1.0] * len(shapes), advantages, mask_truncated=False
    )
    assert [len(row.token_ids) for row in rows] == [length for length, _ in shapes if length]
    loss, truth, _ = padded.update(tiny_model, rows, settings)
    learner, metrics, gradient = update(tiny_model, rows, settings)
    padded.assert_gradient(learner, gradient, truth)
    assert metrics["policy/loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)


def test_only_truncated_completions_that_are_masked_are_no_update(tiny_model):
    learner = Learner(Policy(tiny_model), Config(mask_truncated_completions=True))
    before = learner.optimizer.live.clone()
    row = make(PROMPTS[0], 5, 1.0, seed=1, trained=False)
    assert learner.update([row], 0) == {"update/skipped": 1.0}
    assert torch.equal(learner.optimizer.live, before)
