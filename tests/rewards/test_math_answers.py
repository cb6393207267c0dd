"""Which answer is read out of a completion, and spellings of one value that need no worker."""

from __future__ import annotations

import pytest

from polymath_fast.rewards import units
from polymath_fast.rewards.equality import settle
from polymath_fast.rewards.extraction import extract_answer, extract_choice


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
