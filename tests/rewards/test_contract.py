"""What rewards may return, how several are summed, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy
import pytest
import torch

from polymath_fast import rewards
from polymath_fast.errors import UserError
from polymath_fast.rewards import RewardSet, Scores
from polymath_fast.rewards.contract import validated


@dataclass
class Fixed:
    """A reward that says what it is told to say."""

    name: str
    values: list[float | None]
    failures: dict[int, str] = field(default_factory=dict)
    timeouts: int = 0
    closed: bool = False

    def score(self, batch):
        return Scores(values=self.values, failures=self.failures, timeouts=self.timeouts)

    def close(self):
        self.closed = True


def result_of(*fixed: Fixed, weights=None):
    size = len(fixed[0].values)
    columns = {"answer": ["5"] * size}
    return RewardSet(fixed, weights).score(["p"] * size, ["c"] * size, [[1]] * size, columns)


def test_lists_of_numbers_pass_as_floats():
    returned = [1, 0.5, None, True, numpy.float32(0.25), numpy.int64(2), numpy.bool_(False)]
    assert validated(returned, 7) == [1.0, 0.5, None, 1.0, 0.25, 2.0, 0.0]
    assert validated((1.0,), 1) == [1.0]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (1.0, "returned a float"),
        (None, "returned a NoneType"),
        ([1.0, 2.0], "returned 2 rewards for 3 completions"),
        ([1.0] * 4, "returned 4 rewards for 3 completions"),
        (["1", "0", "1"], "returned a str at position 0"),
        ("111", "returned a str"),
        ((x for x in (1.0, 2.0, 3.0)), "returned a generator"),
        (torch.ones(3), r"returned a Tensor; call .tolist\(\)"),
        (numpy.ones(3), r"returned a ndarray; call .tolist\(\)"),
        ([1.0, torch.tensor(1.0), 0.0], r"returned a Tensor at position 1; call .item\(\)"),
        ([1.0, float("nan"), 0.0], "returned nan at position 1"),
        ([float("-inf"), 1.0, 0.0], "returned -inf at position 0"),
        ([1.0, 1.0, 1e30], r"returned 1e\+30 at position 2"),
        ([1.0, 10**400, 1.0], "returned inf at position 1"),
        ([[1.0], 1.0, 1.0], "returned a list at position 0"),
        ([1j, 1.0, 1.0], "returned a complex at position 0"),
        ({"a": 1, "b": 2, "c": 3}, "returned a dict"),
    ],
)
def test_anything_else_is_refused_by_name(returned, said):
    with pytest.raises(ValueError, match=said):
        validated(returned, 3)


def test_weighted_sum_leaves_out_what_does_not_apply():
    result = result_of(
        Fixed("a", [1.0, 0.0, None, None]), Fixed("b", [1.0, None, 0.5, None]), weights=[1.0, 0.2]
    )
    assert result.total == pytest.approx([1.2, 0.0, 0.1, None])
    assert result.per_reward == {"a": [1.0, 0.0, None, None], "b": [1.0, None, 0.5, None]}
    assert result.metrics["reward/excluded_ratio"] == 0.25
    assert result.metrics["reward/a"] == 0.5
    assert result.metrics["reward/b"] == 0.75


def test_a_failure_excludes_the_completion_from_every_reward():
    values = [1.0] * 9
    result = result_of(
        Fixed("a", [None, *values], failures={0: "it died"}, timeouts=2), Fixed("b", [1.0] * 10)
    )
    assert result.total == [None, *([2.0] * 9)]
    assert result.metrics["reward/excluded_ratio"] == 0.1
    assert result.metrics["reward/timeout_ratio"] == 0.2
    assert result.notes == [
        "the reward 'a' failed on 1 of 10 completions (excluded); the first one: it died"
    ]


def test_more_than_a_fifth_of_failures_is_an_error():
    ok = Fixed("a", [None] * 2 + [1.0] * 8, failures={0: "x", 1: "x"})
    assert result_of(ok).total.count(None) == 2
    bad = Fixed("a", [None] * 3 + [1.0] * 7, failures={0: "x", 1: "x", 2: "x"})
    with pytest.raises(UserError, match="'a' failed on 3 of 10 completions.*a fifth.*: x"):
        result_of(bad)


def test_no_reward_at_all_is_an_error():
    with pytest.raises(UserError, match="a gave None for all 3"):
        result_of(Fixed("a", [None, None, None]))


def test_empty_batch():
    assert RewardSet([Fixed("a", [])]).score([], [], [], {}).total == []


def test_close_reaches_every_reward():
    fixed = [Fixed("a", [1.0]), Fixed("b", [1.0])]
    with RewardSet(fixed):
        pass
    assert [reward.closed for reward in fixed] == [True, True]


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        (r"so it is \boxed{5}", 1.0),
        (r"\boxed{\frac{1}{2}}", 1.0),
        (r"<think>try \boxed{4}</think> \boxed{5}", 1.0),
        (r"\boxed{4} or \boxed{5}", 0.0),
        (r"\boxed{}", 0.0),
        (r"\boxed{ }", 0.0),
        (r"\boxed{5", 0.0),
        (r"<think>\boxed{5}</think>", 0.0),
        (r"<think>\boxed{5}", 0.0),
        ("the answer is 5", 0.0),
    ],
)
def test_format_reward(completion, value):
    result = rewards.build(["format"]).score(["p"], [completion], [[1]], {})
    assert result.total == [value]


def test_length_reward_is_the_soft_overlong_punishment():
    built = rewards.build(["length"], max_completion_length=100)
    lengths = [1, 80, 85, 90, 100, 120]
    result = built.score(["p"] * 6, ["c"] * 6, [[0] * n for n in lengths], {})
    assert result.total == pytest.approx([0.0, 0.0, -0.25, -0.5, -1.0, -1.0])


def test_check_tells_right_from_wrong():
    sample = SimpleNamespace(prompt="p", answer="0", columns={})
    with rewards.build(["math", "format"], [1.0, 0.5]) as built:
        check = built.check(sample, str.encode)
    assert (check.gold, check.wrong) == (1.5, 0.5)
    assert (check.gold_completion, check.wrong_completion) == (r"\boxed{0}", r"\boxed{1}")
    assert check.separates
    assert not rewards.build(["format"]).check(sample, str.encode).separates


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        ([], {}, "no reward is named"),
        (["maths"], {}, "there is no reward of that name; there are math, format, length"),
        (["math", "math"], {}, "named twice"),
        (["math"], {"weights": [1.0, 2.0]}, "has 2 values for 1 rewards"),
        (["math"], {"timeout": 0.0}, "must be above 0"),
        (["length"], {}, "needs a maximum completion length"),
        ([lambda: None], {}, "not as a function"),
        (["nowhere.py:reward"], {}, "there is no file .*nowhere.py"),
        (["my_reward.py:"], {}, "file.py:function"),
        (["my_reward.py:a b"], {}, "file.py:function"),
    ],
)
def test_names_that_cannot_be_built(names, options, said):
    with pytest.raises(UserError, match=said):
        rewards.build(names, **options)


def test_importing_rewards_stays_light():
    code = (
        "import sys, polymath_fast.rewards;"
        "print({'torch', 'vllm', 'sympy', 'numpy', 'math_verify'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
