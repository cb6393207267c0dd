"""Ratios off 1: what micro-batches add up to is what the plain padded pass makes of all rows."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import padded
import pytest
import torch
from test_exactness import some_rows

from polymath_fast.config import Config
from polymath_fast.config.settings import LossType
from polymath_fast.learner.loss import Divisors, loss_spec
from polymath_fast.learner.metrics import UpdateMetrics
from polymath_fast.learner.policy import Policy
from polymath_fast.learner.step import Learner

OPTIONS = {
    "cispo": {"epsilon_high": 1.1},
    # a tiny model's probabilities are about 1/300, and so is what they move by
    "dppo_tv": {"epsilon": 0.002, "epsilon_high": 0.001},
    "dppo_kl": {"epsilon": 0.0004, "epsilon_high": 0.0002},
}
WITHOUT_BOUNDS = ("sapo", "vespo", "reinforce", "gpg")


def moved(row, logprobs):
    """Others than `logprobs`, the same for equal completions, as those of one policy are."""
    noise = torch.randn(12, generator=torch.Generator().manual_seed(sum(row.token_ids)))
    return (logprobs + 0.4 * noise[: len(logprobs)]).tolist()


@pytest.fixture(scope="module")
def rows(tiny_model):
    """`some_rows` with the log-probs of a policy that has learned since."""
    made = some_rows()
    with torch.no_grad():
        logprobs, _ = padded.token_logprobs(padded.load(tiny_model), made, 0.8)
    parts = logprobs.split([len(row.token_ids) for row in made])
    return [
        replace(row, old_logprobs=moved(row, now)) for row, now in zip(made, parts, strict=True)
    ]


@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_loss_and_every_gradient_of_a_later_update(tiny_model, rows, loss_type, monkeypatch):
    # one call on everything counts what it divides by
    monkeypatch.setattr(padded, "loss_spec", lambda config, divisors: loss_spec(config))
    settings = Config(
        loss_type=loss_type,
        temperature=0.8,
        max_completion_length=12,
        tokens_per_microbatch=14,
        updates_per_batch=2,  # luspo's ratio is one a completion then
        **OPTIONS.get(loss_type, {}),
    )
    loss, truth, found = padded.update(tiny_model, rows, settings)
    learner = Learner(Policy(tiny_model, dtype=torch.float32), settings)
    trained = [row for row in rows if row.trained]
    spec = loss_spec(settings, Divisors(sum(len(row.token_ids) for row in trained), len(rows)))
    metrics = UpdateMetrics(settings)
    needed = [row for row in trained if row.advantage != 0]
    learner.passes.learn(needed, spec, metrics, int)
    padded.assert_gradient(learner, learner.optimizer.grad, truth)
    assert metrics.result(learner.ranks)["policy/loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    # otherwise a loss could pass that never looks at its bounds
    assert loss_type in WITHOUT_BOUNDS or 0.05 < found["clip_ratio/region"] < 0.95
