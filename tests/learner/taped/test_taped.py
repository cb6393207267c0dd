"""Learning from what the sampler kept equals learning with a forward pass of one's own."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from closeness import relative_error
from taping import FAMILIES, PROMPTS, plain, policy_of, recording, sampled, update

from polymath_fast.config import Config
from polymath_fast.kernels.linear_grpo_loss.recorded import recorded_grpo_loss
from polymath_fast.learner.packing import merge_duplicates
from polymath_fast.learner.step import Learner
from polymath_fast.rollout.speculation import Speculation
from polymath_fast.rollout.tape import Tape


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [30, 1024])
@pytest.mark.parametrize("tree", ["off", "on"])
def test_float32_gradients_are_those_of_a_forward_pass(family, tokens, tree, passes):
    policy = policy_of(family, torch.float32)
    rows = sampled(policy, recording(2000))
    assert all(row.recorded is not None for row in rows)
    settings = {"tokens_per_microbatch": tokens, "prefix_tree": tree}
    metrics, gradient = update(policy, rows, **settings)
    assert sum(passes) == len(rows) and (tokens == 30) == (len(passes) > len(PROMPTS))
    expected, truth = update(policy, plain(rows), **settings)
    assert len(passes) and relative_error(gradient, truth) < 1e-5
    assert metrics["policy/loss"] == pytest.approx(expected["policy/loss"], abs=1e-6)
    assert metrics["policy/entropy"] == pytest.approx(expected["policy/entropy"], rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_gradients_are_as_near_to_the_truth(family):
    """The truth is the same weights in float32; both passes round, in places of their own."""
    policy = policy_of(family, torch.bfloat16)
    rows = sampled(policy, recording(2000))
    found = update(policy, rows)[1]
    own = update(policy, plain(rows))[1]
    exact = policy_of(family, torch.float32)
    exact.model.load_state_dict(policy.model.state_dict())
    truth = update(exact, plain(rows))[1]
    assert relative_error(found, truth) < 1.2 * relative_error(own, truth) < 0.2


@pytest.mark.parametrize(
    ("tape", "settings", "kept"),
    [
        ({}, {}, True),
        ({}, {"loss_type": "gspo"}, True),
        ({}, {"active_vocabulary": "auto"}, True),
        ({}, {"temperature": 0.7}, False),
        ({}, {"entropy_coef": 0.01}, False),
        ({"predictions": False}, {}, False),
    ],
)
def test_the_loss_reads_what_tokens_were_drawn_from(tape, settings, kept, monkeypatch):
    """Where that is what it needs; elsewhere it computes logits from the tape's last states."""
    called = []

    def spied(*args, **more):
        called.append(args)
        return recorded_grpo_loss(*args, **more)

    # by its name, for the package has an operator of the same one
    module = sys.modules["polymath_fast.kernels.linear_grpo_loss.recorded"]
    monkeypatch.setattr(module, "recorded_grpo_loss", spied)
    policy = policy_of("random:tiny", torch.float32)
    recorder = Tape(2000, **tape)
    recorder.start_step()
    rows = sampled(policy, recorder)
    metrics, gradient = update(policy, rows, **settings)
    assert bool(called) == kept and metrics["packing/taped_ratio"] == 1
    expected, truth = update(policy, plain(rows), **settings)
    assert relative_error(gradient, truth) < 1e-5
    assert metrics["policy/loss"] == pytest.approx(expected["policy/loss"], abs=1e-6)
    assert metrics["policy/entropy"] == pytest.approx(expected["policy/entropy"], rel=1e-5)


def test_two_updates_are_equal_bit_for_bit():
    policy = policy_of("random:tiny", torch.bfloat16)
    rows = sampled(policy, recording(2000))
    assert torch.equal(update(policy, rows)[1], update(policy, rows)[1])


def test_greedy_completions_are_one_row_of_the_tape(passes):
    """Duplicates are merged whoever recorded them, also where only some are recorded."""
    policy = policy_of("random:tiny", torch.float32)
    rows = sampled(policy, recording(40), temperature=0, n=6, prompts=PROMPTS[:1])
    rows = [replace(row, advantage=0.7) for row in rows]
    assert relative_error(update(policy, rows)[1], update(policy, plain(rows))[1]) < 1e-5
    assert passes == [1]


def test_drafts_that_were_wrong_leave_no_trace(passes):
    policy = policy_of("random:tiny", torch.float32)
    speculation = Speculation(5, rows=96)
    truth = sampled(policy, Tape())
    for prompt in PROMPTS:
        known = [row.token_ids for row in truth if row.prompt_ids == prompt]
        speculation.history.add(prompt, known * 3)
    rows = sampled(policy, recording(4000), speculation=speculation)
    assert speculation._counts["drafted"] > speculation._counts["accepted"] > 10
    assert all(row.recorded is not None for row in rows)
    assert relative_error(update(policy, rows)[1], update(policy, plain(rows))[1]) < 1e-5
    assert sum(passes) == len(rows)


def test_a_lent_gradient_changes_no_bit():
    """The sampler works where the gradient will be; before, between and after updates."""
    found = []
    for lends in (False, True):
        policy, tape = policy_of("random:tiny", torch.bfloat16), Tape(2000)
        learner = Learner(policy, Config(max_completion_length=30, learning_rate=1e-3), lends=lends)
        for step in range(2):
            tape.start_step()
            with learner.lend() as arena:
                rows = sampled(policy, tape)
            assert (arena is not None and arena.most > 0) == lends
            rows = [
                replace(row, recorded=row.recorded._replace(weight_version=step)) for row in rows
            ]
            learner.update(rows, step)
        found.append(([row.token_ids for row in rows], learner.optimizer.live.clone()))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_prompts_with_few_rows_learn_side_by_side(passes):
    policy, prompts = policy_of("random:tiny", torch.float32), [*PROMPTS, (11, 12, 13)]
    tape = recording(2000)
    rows = sampled(policy, tape, prompts=prompts, n=4) + sampled(policy, tape, prompts=prompts[:1])
    many = sum(len(row.token_ids) - 1 for row in rows if row.prompt_ids == prompts[0])
    few = max(
        sum(len(row.token_ids) - 1 for row in rows if row.prompt_ids == prompt)
        for prompt in prompts[1:]
    )
    found = update(policy, rows, tokens_per_microbatch=4 * (few + 1))[1]
    ours = [row for row in rows if row.prompt_ids == prompts[0]]
    assert few < many and passes == [len(merge_duplicates(ours))]
    assert relative_error(found, update(policy, plain(rows), tokens_per_microbatch=1024)[1]) < 1e-5
