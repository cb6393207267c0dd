"""The maths reward: what counts as equal to the right answer, and when a worker is asked."""

from __future__ import annotations

import threading

import pytest

from polymath_fast.errors import UserError
from polymath_fast.rewards import RewardInput
from polymath_fast.rewards.math_reward import MathReward


@pytest.fixture(scope="module")
def reward():
    reward = MathReward(timeout=10.0)
    yield reward
    reward.close()


def score(reward: MathReward, completions: list[str], gold: str) -> list[float | None]:
    size = len(completions)
    return reward.score(
        RewardInput(
            prompts=["p"] * size,
            completions=completions,
            completion_ids=[[1]] * size,
            columns={"answer": [gold] * size},
        )
    ).values


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("2+3", "5", True),
        (r"\sqrt{25}", "5", True),
        (r"\frac{\sqrt{12}}{2}", r"\sqrt{3}", True),
        ("3.46410", r"2\sqrt{3}", True),
        (r"(x+1)^2", "x^2+2x+1", True),
        (r"1-\sqrt{19}, 1+\sqrt{19}", r"1 \pm \sqrt{19}", True),
        (
            r"\begin{pmatrix} -\frac13 \\ \frac23 \end{pmatrix}",
            r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}",
            True,
        ),
        (r"(1,\frac{4}{2})", "(1,2)", True),
        ("(0,1.5)", "(0,1)", False),
        ("(2,1)", "(1,2)", False),
        ("5 or 7", "5", False),
        (r"x=5 \text{ and } x=7", "5", False),
        ("5,7", "5", False),
        ("84, 69", "$69$, $84$", True),
        ("84, 70", "$69$,$84$", False),
        (r"\$2+3", r"\$5", True),
        ("3, 500", "3500", False),
        (r"\text{(C)}", "C", True),
        ("C", r"\text{(C)}", True),
        ("5x", "5", False),
        (r"\infty", "5", False),
        ("NaN", "5", False),
        ("1e400", "5", False),
        (r"\pi", "3.14", False),
        ("3.142", r"\pi", False),
        ("2i", "2", False),
        (r"10000 + 10^{-9}", "10000", False),
        (r"\sqrt[3]{2048}", "12.8", False),
        ("y=5", "x=5", False),
        ("1/0", "5", False),
    ],
)
def test_symbolic_equality(reward, answer, gold, right):
    assert score(reward, [rf"so \boxed{{{answer}}}"], gold) == [float(right)]


def test_an_exponent_is_not_the_last_number(reward):
    assert score(reward, ["the area is 12 m\u00b2", "so x is \\boxed{\u03c0/2}"], "12") == [
        1.0,
        0.0,
    ]
    assert score(reward, [r"\boxed{\pi/2}", "\\boxed{\u03c0/2}"], r"\frac{\pi}{2}") == [1.0, 1.0]
    assert score(reward, [r"\boxed{(x+1)^2}"], "x\u00b2 + 2x + 1") == [1.0]


def test_gold_answers_may_come_boxed_or_between_dollars(reward):
    assert score(reward, ["5", "6"], r"$\boxed{5}$") == [1.0, 0.0]
    assert score(reward, ["5", "6"], "$5$") == [1.0, 0.0]


def test_each_distinct_answer_is_verified_once(reward, monkeypatch):
    asked = []
    run = reward.pool.run

    def spy(requests, *args, **kwargs):
        asked.extend(request["answer"] for request in requests)
        return run(requests, *args, **kwargs)

    monkeypatch.setattr(reward.pool, "run", spy)
    completions = [r"\boxed{17+1}", r"\boxed{18}", r"\boxed{17+1}", r"\boxed{17+2}"] * 5
    assert score(reward, completions, "18") == [1.0, 1.0, 1.0, 0.0] * 5
    assert score(reward, completions, "18") == [1.0, 1.0, 1.0, 0.0] * 5
    assert sorted(asked) == ["17+1", "17+2"]
    assert score(reward, completions[:1], "19") == [0.0], "another gold answer is another question"


def test_memory_of_verdicts_is_bounded(reward, monkeypatch):
    monkeypatch.setattr("polymath_fast.rewards.math_reward.REMEMBERED_ANSWERS", 3)
    score(reward, [rf"\boxed{{{k}+1}}" for k in range(6)], "100")
    assert len(reward._verdicts) == 3


def test_plain_answers_start_no_process():
    reward = MathReward()
    assert score(reward, ["5", "6", r"\boxed{\frac{10}{2}}", ""], "5") == [1.0, 0.0, 1.0, 0.0]
    assert reward.pool.pids() == []


def test_any_thread_may_score(reward):
    results = {}

    def work(k: int) -> None:
        results[k] = score(reward, [rf"\boxed{{{k}+{j}}}" for j in range(4)], str(k + 2))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: [0.0, 0.0, 1.0, 0.0] for k in range(4)}


def test_samples_without_an_answer_are_refused(reward):
    with pytest.raises(UserError, match="give --answer"):
        score(reward, ["5"], None)
    batch = RewardInput(prompts=["p"], completions=["5"], completion_ids=[[1]], columns={})
    with pytest.raises(UserError, match="give --answer"):
        reward.score(batch)
