"""Options of FastGRPOTrainer: each is read or refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl")

from trl import GRPOConfig  # noqa: E402
from trl_runs import rollouts, train  # noqa: E402

from polymath_fast.errors import UserError  # noqa: E402
from polymath_fast.integrations.trl import FastGRPOTrainer  # noqa: E402
from polymath_fast.integrations.trl.settings import policy_spec  # noqa: E402


def test_vocab_tolerance_is_logged(tiny_model: Path, tmp_path: Path) -> None:
    options = {"vocab_tol": 0.05}
    run = train(
        FastGRPOTrainer,
        tiny_model,
        tmp_path,
        rollout_func=rollouts(320, 2),
        trainer_options=options,
    )
    assert 0 < run.history[0]["vocab/live_share"] < 1
    assert run.history[0]["vocab/dropped_mass"] > 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loss_type": "sapo", "delta": 1.5}, "delta=1.5 has no effect"),
        ({"loss_type": "cispo", "epsilon": 0.1, "epsilon_high": 3.0}, "epsilon=0.1 has no effect"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "no effect"),
        ({"loss_type": "ppo"}, "loss_type='ppo'"),
        ({"top_entropy_quantile": 0.0}, "top_entropy_quantile=0.0"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    tiny_model: Path, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError) as refusal:
        train(FastGRPOTrainer, tiny_model, tmp_path, **options)
    assert named in str(refusal.value)


def test_every_option_of_the_loss_is_read(tmp_path: Path) -> None:
    """Each option of GRPOConfig that the loss knows changes the spec."""
    defaults = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    changed = {
        "epsilon": 0.1,
        "epsilon_high": 0.3,
        "delta": 1.5,
        "beta": 0.1,
        "importance_sampling_level": "sequence",
        "off_policy_mask_threshold": 0.5,
        "top_entropy_quantile": 0.5,
        "entropy_coef": 0.1,
        "loss_type": "grpo",
        "max_completion_length": 17,
    }
    plain = policy_spec(defaults, 1.0)
    for name, value in changed.items():
        options = SimpleNamespace(**{**vars(defaults), name: value})
        spec = policy_spec(options, 1.0)
        assert dataclasses.asdict(spec)[name] == value != getattr(plain, name)
    options = SimpleNamespace(**{**vars(defaults), "loss_type": "cispo", "epsilon": 0.4})
    assert policy_spec(options, 1.0).clip_high == 0.4
