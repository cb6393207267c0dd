"""The maths reward: which answer is read out of a completion, and what counts as equal to it."""

from __future__ import annotations

import threading

import pytest

from polymath_fast.errors import UserError
from polymath_fast.rewards import RewardInput, units
from polymath_fast.rewards.equality import settle
from polymath_fast.rewards.extraction import extract_answer, extract_choice
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
    ("completion", "answer"),
    [
        (r"first \boxed{4}, no: \boxed{5}", "5"),
        (r"The answer is 7. \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{5} and then cut off \boxed{6", "5"),
        (r"put it in \boxed{}. The answer is 42.", "42"),
        (r"\fbox{3}", "3"),
        (r"as JSON: \\boxed{4}, \\boxed{5}", "5"),
        (r"} {{ \left\{ \boxed{6}", "6"),
        (r"$\boxed {8}$", "8"),
        (r"\boxed{x = \boxed{5}}", "5"),
        ("The final answer is: **42**.", "42"),
        ("the Answer is $\\frac{3}{4}$. I hope it is correct.", r"\frac{3}{4}"),
        (r"So the answer is \(x=5\).", "x=5"),
        ("The answer is 12 apples.", "12"),
        ("The answer is x = -3.", "-3"),
        ("The answer is 5 or 7.", "5 or 7"),
        ("answer is 3. No, the answer is 4", "4"),
        ("3 times 4 makes 12", "12"),
        ("it costs 1,234.50 dollars in all", "1,234.50"),
        ("the share is 3/4", "3/4"),
        (r"so we get \frac{3}{4}", r"\frac{3}{4}"),
        ("10-5", "5"),
        ("it falls by -5", "-5"),
        ("\uff15 \uff0b \uff12 \uff1d \uff17", "7"),
        ("no number at all", None),
        ("", None),
    ],
)
def test_answer_of_a_completion(completion, answer):
    assert extract_answer(completion) == answer


def test_only_the_final_part_counts_after_thinking():
    assert extract_answer(r"<think>maybe \boxed{4}</think> it is \boxed{5}") == "5"
    assert extract_answer(r"<think>surely \boxed{5}, 5, 5</think> I do not know") is None
    assert extract_answer(r"thought \boxed{4} without end") == "4"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("5.0", "5"),
        (r"5\%", "5"),
        ("0.05", r"5\%"),
        ("5,000", "5000"),
        (r"1{,}000", "1000"),
        (r"11,\! 111,\! 100", "11111100"),
        (r"\frac{270}7\text{ degrees}", "270/7"),
        (r"864 \mbox{ inches}^2", "864"),
        (r"\frac12", "0.5"),
        (r"\dfrac{1}{2}", r"\frac12"),
        ("1/2", "0.5"),
        (r"-\frac{1}{2}", "-0.5"),
        (r"\text{5}", "5"),
        ("x=5", "5"),
        ("5", "x = 5"),
        ("12.70", "12.7"),
        ("3.33333", "10/3"),
        (r"90^\circ", "90"),
        (r"12\text{ cm}^2", "12"),
        ("12 square units", "12"),
        ("5 cm", "5"),
        (r"\$18", "18"),
        (r"4.5 \times 10^{33}", "4.5e33"),
        (r"\text{Evelyn}", "evelyn"),
        (r"\left(3, \frac{\pi}{2}\right)", r"( 3, \frac{\pi}{2} )"),
        (r"11\sqrt2", r"11\sqrt{2}"),
        ("-0", "0"),
        ("007", "7"),
        (r"1\frac{1}{2}", "1 1/2"),
        (r"1\tfrac12", "3/2"),
        ("-1 1/2", "-1.5"),
        ("1.5", "1 1/2"),
        ("2\u00bd", "2.5"),
        ("1/2", "\u00bd"),
        ("$5$.", "5"),
        ("5 in", "5 inches"),
        (r"12\text{ m}", "12 metres"),
        ("3 m/s", r"3\,\mathrm{meters\ per\ second}"),
        ("60 mph", "60 miles per hour"),
        ("5 m\u00b2", "5 square meters"),
        ("5 ft^2", "5 sq feet"),
        ("3 mL", r"3\text{ cm}^3"),
        (r"\$5", "5 dollars"),
        ("12 cm", "12"),
        ("12", r"12\text{ cm}"),
        ("x = 5 m", "5 m"),
        (r"2\pi", "2\u03c0"),
        ("x\u00b2 + 1", "x^{2} + 1"),
        ("2\u221a3", r"2\sqrt{3}"),
        ("\u221a(x+1)", r"\sqrt{x+1}"),
        ("10\u207b\u00b3", "10^{-3}"),
        ("(-\u221e, 3]", r"(-\infty, 3]"),
        ("4.5 \u00d7 10\u00b3\u00b3", "4.5e33"),
    ],
)
def test_spellings_of_the_same_value_need_no_worker(answer, gold):
    assert settle(answer, gold) is True


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("28801", "28800"),
        ("28801.0", "28800"),
        ("12.6", "12.7"),
        ("500", "5"),
        ("11/2", "1 1/2"),
        ("12/5", "1 2/5"),
        ("0.05", "5"),
        ("-5", "5"),
        ("", "5"),
        (" ", "5"),
        ("9" * 400, "9" * 399),
        ("1" * 200_000, "5"),
        ("(" * 50, "5"),
        ("12 m", "12 cm"),
        ("12m", "12cm"),
        (r"12\text{ m}", r"12\text{ cm}"),
        ("x = 12 m", "12 cm"),
        (r"\frac{1}{2} \text{ hour}", r"\frac{1}{2} \text{ minute}"),
        (r"2\pi \text{ m}", r"2\pi \text{ km}"),
        ("12 cm^2", "12 cm^3"),
        ("12 cm", "12 square cm"),
        ("5 m/s", "5 km/h"),
        ("5 m/s", "5 m/s^2"),
        ("5 N", "5 J"),
        ("1,200 kg", "1,200 g"),
        (r"\$5", "5 cents"),
    ],
)
def test_other_values_need_no_worker_either(answer, gold):
    assert settle(answer, gold) is False


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


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("5 cm, 3 m", "3 m, 5 cm"),  # the last unit is not that of the whole
        (r"3 J/kg \cdot K", r"3 J/(kg \cdot K)"),
        ("5 apples", "5 cm"),
        ("5 ft 3 in", "63 in"),
    ],
)
def test_what_is_no_single_quantity_has_no_unit(answer, gold):
    assert None in (units.size_of(answer), units.size_of(gold))


def test_units_of_the_same_size_are_one_unit():
    assert not units.differ("2 N", r"2 kg \cdot m/s^2")
    assert not units.differ("2 mL", "2 cm^3")
    assert units.differ("2 N", r"2 kg \cdot m/s")


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


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{(B)}}", "B"),
        (r"\boxed{D. the death rate}", "D"),
        (r"\boxed{c}", "C"),
        ("The answer is (C), since both hold.", "C"),
        ("Answer: A", "A"),
        ("B", "B"),
        (r"\(\boxed{\mathbf{A}}\)", "A"),
        (r"\boxed{E}", None),
        (r"\boxed{Both}", None),
        (r"A because B is wrong and C too", None),
        (r"<think>\boxed{A}</think>", None),
    ],
)
def test_option_letter(completion, letter):
    assert extract_choice(completion, "ABCD") == letter
