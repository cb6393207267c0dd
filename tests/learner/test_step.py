"""What one update does to the weights does not depend on how it is computed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from closeness import relative_error

from benchmarks.ablations import switched_off
from polymath_fast.config import Config
from polymath_fast.learner.packing import TrainingRow
from polymath_fast.learner.passes import Passes
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.rows import training_rows
from polymath_fast.learner.step import Learner
from polymath_fast.rollout.transformers_engine import TransformersEngine
from polymath_fast.rollout.types import Completion, Group, RolloutBatch, SamplingOptions
from polymath_fast.samples import Sample

PROMPT = (5, 9, 17, 33, 70)
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "sapo", "reinforce")


def config(**changes):
    settings = {"learning_rate": 1e-3, "temperature": 0.8, "max_completion_length": 12}
    return Config(**(settings | changes))


@pytest.fixture(scope="module")
def rows(tiny_model):
    """Real samples of the tiny model, so that the ratio to the sampler is 1."""
    engine = TransformersEngine(Policy(tiny_model, dtype=torch.float32), stop_token_ids=range(40))
    sampling = SamplingOptions(max_completion_length=12, temperature=0.8, seed=1)
    completions = engine.generate(PROMPT, 9, sampling)
    return [
        TrainingRow(
            prompt_ids=PROMPT,
            token_ids=c.token_ids,
            sampling_logprobs=c.sampling_logprobs,
            advantage=(-1.0, 0.0, 1.5)[i % 3],
        )
        for i, c in enumerate(completions)
    ]


def learner(folder, settings, reference=False):
    other = Policy(folder, dtype=torch.float32) if reference else None
    return Learner(Policy(folder, dtype=torch.float32), settings, other)


def gradient(folder, settings, rows):
    """The gradient that the update would clip and apply."""
    made = learner(folder, settings)
    seen = {}
    made.optimizer.step = lambda rate: (seen.update(g=made.optimizer.grad.clone()), (1.0, True))[1]
    made.update(rows, 0)
    return seen["g"]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_any_microbatching_gives_the_same_gradient(tiny_model, rows, loss_type):
    whole = gradient(tiny_model, config(loss_type=loss_type), rows)
    for tokens in (17, 30):
        settings = config(loss_type=loss_type, tokens_per_microbatch=tokens)
        assert relative_error(gradient(tiny_model, settings, rows), whole) < 1e-5


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_rows_without_influence_may_stay_out(tiny_model, rows, loss_type):
    """Zero advantages never enter the model; a vanishing entropy bonus forces them in."""
    without = gradient(tiny_model, config(loss_type=loss_type), rows)
    within = gradient(tiny_model, config(loss_type=loss_type, entropy_coef=1e-9), rows)
    assert relative_error(without, within) < 1e-5


def test_rows_without_influence_enter_where_the_benchmark_lets_them(tiny_model, rows, monkeypatch):
    """`benchmarks.ablations`: more rows go through the model, and the gradient is the same."""
    rows = [*rows[:-1], replace(rows[-1], trained=False)]
    entered, learn = [], Passes.learn
    monkeypatch.setattr(
        Passes,
        "learn",
        lambda self, some, *rest: (entered.append(len(some)), learn(self, some, *rest)),
    )
    without = gradient(tiny_model, config(), rows)
    with switched_off("no row without influence"):
        within = gradient(tiny_model, config(), rows)
    assert entered == [5, 9]
    assert relative_error(within, without) < 1e-6


def test_on_policy_ratio_is_one_and_sampler_agrees(tiny_model, rows):
    metrics = learner(tiny_model, config(learning_rate=0.0)).update(rows, 0)
    assert metrics["policy/ratio_max"] == metrics["policy/ratio_mean"] == 1.0
    assert metrics["policy/kl"] == 0.0
    assert metrics["policy/clip_ratio"] == 0.0
    assert metrics["sampling/logprob_diff_max"] < 1e-4
    assert 0 < metrics["policy/entropy"] < 6


def test_reference_model_is_where_training_began(tiny_model, rows):
    made = learner(tiny_model, config(beta=0.1, learning_rate=0.05), reference=True)
    first = made.update(rows, 0)
    second = made.update(rows, 1)
    assert abs(first["policy/kl"]) < 1e-6
    assert second["policy/kl"] > 1e-3


def test_no_pass_of_the_reference_waits_for_the_one_before(tiny_model, rows, monkeypatch):
    made = learner(tiny_model, config(beta=0.1, tokens_per_microbatch=17), reference=True)
    calls, on_cpu, passes = [], torch.Tensor.cpu, made.reference._logprobs
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: calls.append("read") or on_cpu(x))
    monkeypatch.setattr(
        made.reference, "_logprobs", lambda *given: calls.append("pass") or passes(*given)
    )
    filled = made.reference.with_logprobs(rows, "ref_logprobs")
    assert calls[:2] == ["pass", "pass"] and calls == sorted(calls)
    for row in filled:
        assert row.ref_logprobs == pytest.approx(row.sampling_logprobs, abs=1e-4)


def test_several_updates_have_a_real_ratio(tiny_model, rows):
    made = learner(tiny_model, config(updates_per_batch=3, learning_rate=0.02))
    metrics = made.update(rows, 0)
    assert made.optimizer.updates == 3
    assert metrics["policy/ratio_max"] > 1.01
    assert metrics["policy/kl"] > 0
    assert metrics["sampling/logprob_diff_max"] < 1e-4  # measured before the first update


def test_several_updates_see_every_row_once(tiny_model, rows):
    made = learner(tiny_model, config(updates_per_batch=4, learning_rate=0.0))
    seen = []
    original = made.passes.learn
    made.passes.learn = lambda part, *rest: (seen.append(part), original(part, *rest))[1]
    made.update(rows, 0)
    flat = [tuple(row.token_ids) for part in seen for row in part]
    needed = [tuple(row.token_ids) for row in rows if row.advantage]
    assert sorted(flat) == sorted(needed)
    assert len(seen) == 4


def weights_of(made):
    return torch.cat([p.detach().flatten() for p in made.policy.model.parameters()])


@pytest.mark.parametrize("loss_type", ("dapo", "grpo"))
def test_more_updates_than_trained_rows_are_as_many_as_rows(tiny_model, rows, loss_type):
    few = [replace(row, trained=row.advantage != 0 and i < 4) for i, row in enumerate(rows)]
    trained = sum(row.trained for row in few)
    found = []
    for updates in (trained, 3 * trained):
        made = learner(
            tiny_model, config(updates_per_batch=updates, loss_type=loss_type, learning_rate=0.02)
        )
        metrics = made.update(few, 0)
        assert made.optimizer.updates == trained
        found.append((metrics["policy/grad_norm"], weights_of(made)))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_an_update_raises_the_probability_of_what_was_rewarded(tiny_model, rows):
    good = [replace(row, advantage=1.0) for row in rows]
    made = learner(tiny_model, config(learning_rate=0.01))

    def total():
        filled = made.passes.with_logprobs(good, "old_logprobs")
        return sum(sum(row.old_logprobs) for row in filled)

    before = total()
    made.update(good, 0)
    assert total() > before + 1


def test_nothing_to_learn_is_said_and_changes_nothing(tiny_model, rows):
    made = learner(tiny_model, config())
    before = made.optimizer.live.clone()
    assert made.update([replace(row, advantage=0.0) for row in rows], 0) == {"update/skipped": 1.0}
    assert made.update([], 0) == {"update/skipped": 1.0}
    assert torch.equal(before, made.optimizer.live)


def test_a_saturated_batch_may_train_its_entropy_alone(tiny_model, rows):
    flat = [replace(row, advantage=0.0) for row in rows]
    settings = config(on_saturation="entropy", saturation_entropy_coef=0.01, learning_rate=0.0)
    made = learner(tiny_model, settings)
    metrics = made.update(flat, 0)
    assert (metrics["update/entropy_only"], metrics["update/skipped"]) == (1.0, 0.0)
    found = gradient(tiny_model, settings, flat)
    assert relative_error(found, gradient(tiny_model, config(entropy_coef=0.01), flat)) < 1e-6
    # with an advantage somewhere there is no bonus
    assert made.update(rows, 1)["update/entropy_only"] == 0.0
    without = gradient(tiny_model, config(), rows)
    assert relative_error(gradient(tiny_model, settings, rows), without) == 0


def test_rows_of_a_batch():
    sample = Sample("q", "a", "q", PROMPT)

    def completion(tokens, reason="stop"):
        return Completion(
            token_ids=tokens,
            sampling_logprobs=[-1.0] * len(tokens),
            finish_reason=reason,
            weight_version=0,
        )

    group = Group(
        sample=sample,
        completions=[completion([1, 2]), completion([3]), completion([4, 5], "length")],
        rewards=[1.0, None, 0.0],
    )
    rewards, advantages = [1.0, math.nan, 0.0], [0.5, 0.0, -0.5]
    rows = training_rows(RolloutBatch(groups=[group]), rewards, advantages, mask_truncated=True)
    assert [(list(r.token_ids), r.advantage, r.trained) for r in rows] == [
        ([1, 2], 0.5, True),
        ([4, 5], -0.5, False),
    ]


def test_active_vocabulary_changes_the_gradient_by_less_than_rounding(tiny_model, rows):
    settings = config(temperature=0.2)
    exact = gradient(tiny_model, settings, rows)
    less = replace(settings, active_vocabulary="auto")
    error = relative_error(gradient(tiny_model, less, rows), exact)
    metrics = learner(tiny_model, less).update(rows, 0)
    assert 0 < metrics["vocab/live_share"] < 1
    assert 0 < error <= metrics["vocab/error_bound"] <= 2.6e-3
    assert "vocab/live_share" not in learner(tiny_model, settings).update(rows, 0)
