"""What a user may give as a reward function, where it is loaded from, and how it is called."""

from __future__ import annotations

import datetime

import numpy
import pytest
from rewarded import TEN, score

from polymath_fast import rewards
from polymath_fast.errors import UserError
from polymath_fast.rewards import user


def test_the_signature_is_trls(reward_of):
    result = score(
        reward_of("""
            import os
            state = []

            def reward(prompts, completions, completion_ids, answer, **columns):
                state.append(1)
                assert prompts == ["p"] * 10 and completion_ids == [[1, 2]] * 10
                return [len(state) + float(a) + c.count("7") * w
                        for c, a, w in zip(completions, answer, columns["weight"])]
        """),
        weight=numpy.arange(10.0),
    )
    assert result.total == [6.0] * 7 + [13.0] + [6.0] * 2


def test_a_function_gets_only_what_it_accepts(reward_of):
    built = reward_of("def reward(completions, answer, level=3): return [level] * len(completions)")
    assert score(built, unused=[datetime.date(2026, 1, 1)] * 10).total == [3.0] * 10
    with pytest.raises(UserError, match="asks for 'difficulty', which no column has; .*answer"):
        score(reward_of("def reward(completions, difficulty): return [1.0]"))


def test_the_run_keeps_its_own_copies(reward_of):
    completions, level = list(TEN), [[1] for _ in TEN]
    built = reward_of("""
        def reward(completions, level, **columns):
            completions[0] = "changed"
            level[0].append(2)
            return [1.0] * len(completions)
    """)
    assert score(built, completions, level=level).total == [1.0] * 10
    assert completions == TEN
    assert level == [[1]] * 10


@pytest.mark.parametrize("source", ["reward = lambda completions, **columns: [1.0] * 10", None])
def test_lambdas_and_closures_are_functions_too(reward_of, source):
    built = reward_of(
        source
        or """
        def make(value):
            def inner(completions, **columns):
                return [value] * len(completions)
            return inner

        reward = make(1.0)
        """
    )
    assert score(built).total == [1.0] * 10


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def other(): pass", "no function 'reward' in it; it defines other"),
        ("reward = 5", "no function 'reward' in it; it defines no function"),
        ("def reward(:", r"SyntaxError.*\(mine_0.py line 1\)"),
        ("import no_such_module_here", "No module named 'no_such_module_here'.*line 1"),
        ("import sys; sys.exit('not today')", "SystemExit: not today"),
        ("import os; os._exit(4)", "ended at import: exit code 4"),
    ],
)
def test_what_cannot_be_loaded_is_said_at_once(reward_of, source, said):
    with pytest.raises(UserError, match=f"mine_0.py:reward: .*{said}"):
        reward_of(source)


def test_a_module_that_hangs_at_import_is_given_up(reward_of, monkeypatch):
    monkeypatch.setattr(user, "LOAD_TIMEOUT", 0.4)
    with pytest.raises(UserError, match="it did not start in time"):
        reward_of("import time; time.sleep(60)")


def test_functions_of_modules(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def brief(completions): return [-len(c) for c in completions]"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with rewards.build(["my_rewards:brief", "format"], [0.5, 1.0]) as built:
        assert score(built).total == [-3.0] * 10
    with pytest.raises(UserError, match="No module named 'my_other_rewards'"):
        rewards.build(["my_other_rewards:brief"])


def test_names_are_short_and_distinct(tmp_path, reward_of):
    source = "def reward(completions): return [1.0] * len(completions)"
    built = reward_of(source)
    assert list(score(built).per_reward) == ["mine_0.py:reward"]
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "mine_0.py"
    twin.write_text(source)
    with pytest.raises(UserError, match="two rewards are called mine_0.py:reward"):
        rewards.build([f"{tmp_path}/mine_0.py:reward", f"{twin}:reward"])
