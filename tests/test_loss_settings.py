"""Settings of the loss: the rules are those of the spec that they become."""

from __future__ import annotations

import dataclasses
from typing import get_args, get_type_hints

import pytest

from polymath_fast.config import Config
from polymath_fast.config.settings import LossType
from polymath_fast.errors import UserError
from polymath_fast.kernels import PolicyLossSpec
from polymath_fast.kernels.loss_choices import DEPENDENT, KL_ESTIMATORS, LOSS_TYPES, READERS
from polymath_fast.learner.loss import loss_spec


def test_every_loss_that_is_accepted_can_be_built_and_none_is_missing() -> None:
    # the trainer does not offer the coefficient that dro needs, and ranks no tokens of an update
    assert set(get_args(LossType)) == set(LOSS_TYPES) - {"dro", "clip_cov", "kl_cov"}
    assert get_args(get_type_hints(Config)["kl_estimator"]) == KL_ESTIMATORS
    accepted = 0
    for loss_type in get_args(LossType):
        for option in ({}, {"epsilon": 0.1}, {"epsilon_high": 0.5}, {"delta": 4.0}):
            try:
                settings = Config(loss_type=loss_type, **option)
            except UserError:
                continue
            assert loss_spec(settings).loss_type == loss_type
            accepted += 1
    # Six clipped losses read every option, four with a trust region all but delta, cispo needs one
    # of them, four others read none.
    assert accepted == 6 * 4 + 4 * 3 + 1 + 4


# option -> a value that nothing else refuses
IDLE = {
    "epsilon": 0.1,
    "epsilon_high": 0.5,
    "delta": 4.0,
    "kl_estimator": "k1",
    "importance_sampling_clip_max": 2.0,
    "importance_sampling_clip_min": 0.5,
}


@pytest.mark.parametrize("name", IDLE)
@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_an_idle_option_is_refused_where_the_spec_refuses_it(loss_type: str, name: str) -> None:
    option = {"loss_type": loss_type, name: IDLE[name]}
    if loss_type == "cispo":
        option.setdefault("epsilon_high", 5.0)
    try:
        # dr_grpo divides by it
        PolicyLossSpec(max_completion_length=1024, **option)
    except ValueError as refused:
        assert "has no effect" in str(refused)
        with pytest.raises(UserError, match="does not read|which nothing reads"):
            Config(**option)
    else:
        assert getattr(Config(**option), name) == IDLE[name]


def test_every_option_of_the_spec_that_a_loss_may_not_read_is_compared() -> None:
    settings = {field.name for field in dataclasses.fields(Config)}
    assert settings & {*READERS, *DEPENDENT} == {*IDLE}


@pytest.mark.parametrize("delta", [1.01, 1.1, 1.28])
def test_a_delta_below_the_upper_clip_reaches_the_loss(delta: float) -> None:
    assert loss_spec(Config(delta=delta, epsilon_high=0.28)).delta == delta


@pytest.mark.parametrize(("updates", "level"), [(1, "token"), (2, "sequence")])
def test_luspo_of_several_updates_has_the_ratio_of_its_paper(updates: int, level: str) -> None:
    assert loss_spec(Config(loss_type="luspo", updates_per_batch=updates)).level == level
    assert loss_spec(Config(loss_type="dapo", updates_per_batch=updates)).level == "token"
