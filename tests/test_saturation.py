"""Steps whose completions all earn the same: skipped, drawn again, counted and said once."""

from __future__ import annotations

import json

import pytest

from polymath_fast import train
from polymath_fast.config import Config
from polymath_fast.rewards import RewardResult
from polymath_fast.rollout.types import Completion, Group, RolloutBatch
from polymath_fast.run import saturation

REWARD = """
calls = 0

def fixed(prompts, completions, completion_ids, **columns):
    global calls
    calls += 1
    equal = calls != {differs}
    return [1.0 if equal or i else 0.0 for i in range(len(completions))]
"""


def batch(*rewards):
    return RolloutBatch(groups=[Group(sample=None, completions=[], rewards=r) for r in rewards])


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([[1.0, 1.0], [0.0, 0.0]], True),  # groups may differ: only their members are compared
        ([[1.0, None]], True),
        ([[None, None]], True),
        ([[1.0, 1.0], [0.0, 0.5]], False),
    ],
)
def test_saturated(rewards, expected):
    assert saturation.saturated(Config(), batch(*rewards)) is expected


def test_different_rewards_of_masked_completions_teach_nothing():
    settings = Config(on_saturation="resample", max_resamples=2, mask_truncated_completions=True)
    cut, whole = (
        Completion(token_ids=[1], sampling_logprobs=[0.0], finish_reason=reason, weight_version=0)
        for reason in ("length", "stop")
    )
    masked, mixed = batch([1.0, 0.0]), batch([1.0, 0.0])
    masked.groups[0].completions, mixed.groups[0].completions = [cut, cut], [cut, whole]
    assert saturation.saturated(settings, masked) and not saturation.saturated(settings, mixed)
    assert not saturation.saturated(Config(), masked)
    assert saturation.asks_again(settings, masked, 1)
    said = saturation.note(settings, {"update/skipped": 1.0}, masked)
    assert "cut off" in said and "--max-completion-length" in said and "equal" not in said
    assert "equal too" in saturation.note(settings, {"update/skipped": 1.0}, batch([1.0, 1.0]))


def test_rewards_differ_only_where_advantages_compare_them():
    """The maximum-variance rule leaves out what was cut off, and the others agree."""
    group = batch([1.0, 1.0, 0.0])
    group.groups[0].completions = [
        Completion(token_ids=[1], sampling_logprobs=[0.0], finish_reason=reason, weight_version=0)
        for reason in ("stop", "stop", "length")
    ]
    settings = {"mask_truncated_completions": True, "on_saturation": "resample"}
    chosen = Config(num_train_generations=2, **settings)
    assert saturation.saturated(chosen, group) and saturation.asks_again(chosen, group, 1)
    assert not saturation.saturated(Config(**settings), group)
    assert not saturation.saturated(Config(num_train_generations=2), group)


@pytest.mark.parametrize(("beta", "expected"), [(0.0, "bonus was"), (0.1, "the KL penalty were")])
def test_what_a_saturated_step_trained_is_said(beta, expected):
    said = saturation.note(Config(beta=beta), {"update/entropy_only": 1.0}, batch([1.0, 1.0]))
    assert f"{expected} trained alone" in said


def test_asked_again_until_rewards_differ_or_the_limit_is_reached():
    settings = Config(on_saturation="resample", max_resamples=2)
    equal, differing = batch([1.0, 1.0]), batch([1.0, 0.0])
    assert [saturation.asks_again(settings, equal, n) for n in range(4)] == [
        True,
        True,
        True,
        False,
    ]
    assert [saturation.asks_again(settings, differing, n) for n in range(3)] == [True, False, False]
    assert [saturation.asks_again(Config(), equal, n) for n in range(3)] == [True, False, False]


def test_results_of_several_draws_add_up():
    one = RewardResult(
        total=[1.0, None], per_reward={"a": [1.0, None]}, metrics={"x": 0.5, "y": 1.0}, notes=["n"]
    )
    two = RewardResult(total=[0.0], per_reward={"a": [0.0]}, metrics={"x": 2.0}, notes=[])
    both = RewardResult.empty() + one + two
    assert (both.total, both.per_reward) == ([1.0, None, 0.0], {"a": [1.0, None, 0.0]})
    assert (both.metrics, both.notes) == ({"x": 1.0, "y": 1.0}, ["n"])


@pytest.mark.parametrize(
    ("option", "differs", "expected"),
    [
        # (update/skipped, rollout/resampled, update/entropy_only, number of completions) of 3 steps
        (["skip"], 99, [(1, 0, None, 8)] * 3),
        (
            ["resample", "--max-resamples", "2"],
            2,
            [(0, 1, 0, 16), (1, 2, None, 24), (1, 2, None, 24)],
        ),
        (["entropy"], 99, [(0, 0, 1, 8)] * 3),
    ],
)
def test_a_run_of_equal_rewards(tmp_path, capsys, option, differs, expected):
    (tmp_path / "my.py").write_text(REWARD.format(differs=differs))
    words = [
        *("--model", "random:tiny", "--engine", "transformers"),
        *("--question", "Say something.", "--answer", "e"),
        *("--reward", f"{tmp_path / 'my.py'}:fixed", "--max-steps", "3"),
        *("--num-generations", "8", "--groups-per-step", "1", "--max-completion-length", "4"),
        *("--output-dir", str(tmp_path / "run"), "--on-saturation", *option),
    ]
    assert train.main(words) == 0
    told = capsys.readouterr().out
    keys = ("update/skipped", "rollout/resampled", "update/entropy_only")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    completions = (tmp_path / "run/completions.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in completions]
    found = [(*(row.get(key) for key in keys), steps.count(row["step"])) for row in rows]
    assert found == expected
    assert told.count("said once") == 1
    skipped = sum(row[0] for row in expected)
    assert (f"{skipped} steps had nothing to learn" in told) == bool(skipped)
