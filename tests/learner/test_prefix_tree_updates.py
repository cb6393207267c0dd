"""What the learner makes of rows that completions share: nothing but fewer rows."""

from __future__ import annotations

from dataclasses import replace

import padded
import pytest
import torch
from tree_rows import EVERY, PROMPTS, row

from polymath_fast.config import Config
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.prefix_tree import Rule
from polymath_fast.learner.step import Learner
from polymath_fast.models import resolve_model


def some(prompt, tokens):
    return [
        row(prompt, each, advantage=(1.5, -1.0, 0.5)[i % 3], seed=i)
        for i, each in enumerate(tokens)
    ]


HEAD = [41, 42, 43, 44, 45, 46]
SHAPES = {
    "one beginning": [[*HEAD, 50 + i, 60, 61][: 7 + i % 3] for i in range(5)],
    "deep": [[*HEAD[:i], 50 + i, 51, 52] for i in range(7)],
    "deep and shallow": [
        [*HEAD, 50, 51], [*HEAD, 50, 52, 53], [*HEAD[:3], 54], [*HEAD[:3], 55, 56], [57, 58], [59],
    ],
    "all identical": [HEAD] * 4,
    "beginnings of each other": [HEAD[:n] for n in (6, 3, 1, 5)] + [[*HEAD[:4], 50]],
    "one token each": [[50], [51], [50]],
    "nothing in common": [[50, 51, 52], [53, 54], [55, 56, 57]],
}  # fmt: skip


def learner(folder, settings, rule=EVERY, **options):
    made = Learner(Policy(folder, dtype=torch.float32, **options), settings)
    made.passes.tree_rule = rule
    return made


def gradient(made, rows):
    seen = {}
    made.optimizer.step = lambda rate: (
        seen.update(g=made.optimizer.grad.clone()), (torch.ones(()), torch.ones(())),
    )[1]  # fmt: skip
    return seen, made.update(rows, 0)


def assert_exact(folder, rows, settings, rule=EVERY):
    """Loss, log-probs and all gradients; returns metrics."""
    made = learner(folder, settings, rule)
    loss, truth, _ = padded.update(folder, rows, settings)
    filled = made.passes.with_logprobs(rows, "old_logprobs")
    with torch.no_grad():
        expected, _ = padded.token_logprobs(padded.load(folder), rows, settings.temperature)
    found = torch.tensor([x for each in filled for x in each.old_logprobs])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    seen, metrics = gradient(made, rows)
    padded.assert_gradient(made, seen["g"], truth)
    assert metrics["policy/loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    return metrics


@pytest.mark.parametrize("tokens", [14, 16384], ids=["split", "whole"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_update_in_a_tree_equals_the_padded_pass(tiny_model, shape, tokens):
    settings = Config(tokens_per_microbatch=tokens, max_completion_length=12, temperature=0.8)
    assert_exact(tiny_model, some(PROMPTS[0], shape), settings)


@pytest.mark.parametrize("family", ["tiny", "tiny-qwen2", "tiny-qwen3"])
@pytest.mark.parametrize("tokens", [18, 16384], ids=["split", "whole"])
def test_several_prompts_and_families(family, tokens):
    folder = resolve_model(f"random:{family}", notify=lambda text: None)
    settings = Config(tokens_per_microbatch=tokens, max_completion_length=12, beta=0.05)
    rows = [
        replace(each, ref_logprobs=[-6.0] * len(each.token_ids))
        for name in ("one beginning", "deep and shallow", "beginnings of each other")
        for prompt in PROMPTS
        for each in some(prompt, SHAPES[name])
    ]
    metrics = assert_exact(folder, rows[::2] + rows[1::2], settings, Rule(shortest=2))
    assert metrics["packing/tree_used"] > 0.5


def test_checkpointing_and_duplicates_in_a_tree(tiny_model):
    """Completions that the loss cannot tell apart count as often as they are there."""
    rows = some(PROMPTS[0], SHAPES["deep and shallow"])
    rows += rows[:3]
    settings = Config(tokens_per_microbatch=16, max_completion_length=12)
    _, truth, _ = padded.update(tiny_model, rows, settings)
    made = learner(tiny_model, settings, gradient_checkpointing=True)
    seen, _ = gradient(made, rows)
    padded.assert_gradient(made, seen["g"], truth)


def test_metrics_say_what_was_saved(tiny_model):
    # inputs of 6, 7, 8, 6 and 7 tokens that have 6 in common; those of 6 are duplicates
    rows = some(PROMPTS[0], SHAPES["one beginning"])
    settings = Config(max_completion_length=12, tokens_per_microbatch=100)
    _, metrics = gradient(learner(tiny_model, settings), rows)
    assert metrics["packing/rows_saved_ratio"] == pytest.approx(18 / 28)
    assert metrics["packing/tree_used"] == 1
    _, metrics = gradient(learner(tiny_model, settings, rule=None), rows)
    assert metrics["packing/rows_saved_ratio"] == metrics["packing/tree_used"] == 0
