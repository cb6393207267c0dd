"""Completions written to break the verifier: each is scored in time, rightly, and alone."""

from __future__ import annotations

import time

import pytest

from polymath_fast import rewards
from polymath_fast.rewards.extraction import extract_answer

TIMEOUT = 0.5


@pytest.fixture(scope="module")
def reward_set():
    with rewards.build(["math"], timeout=TIMEOUT) as built:
        # the start of the worker processes is not what is timed below
        built.score(["p"], [r"\boxed{2+3}"], [[1]], {"answer": ["5"]})
        yield built


def score(reward_set, *completions: str, gold: str = "5") -> list[float | None]:
    size = len(completions)
    return reward_set.score(
        ["p"] * size, list(completions), [[1]] * size, {"answer": [gold] * size}
    ).total


BOMBS = {
    "power tower with log": r"10^{(5^{5^{5^{5^{5}}}} \cdot \log_{10}(5) - 4)}",
    "power tower": r"9^{9^{9^{9}}}",
    "factorial": "(10^7)!",
    "binomial": r"\binom{10^9}{5\cdot10^8}",
    "sum of 1e9 terms": r"\sum_{k=1}^{10^9} 1/(k^3+k+1)",
    "hard integral": r"\int_0^1 e^{\sin(x^x)}dx",
    "wide matrix": r"\begin{pmatrix}" + "1&" * 3000 + r"1\end{pmatrix}",
    "200,000 digits": "7" * 200_000,
    "20,000 nested braces": "{" * 20_000 + "}" * 20_000,
    "400 nested fractions": r"\frac{1}{1+" * 400 + "1" + "}" * 400,
    "1 MB of a": "a" * 1_000_000,
    "1 MB of backslashes": "\\" * 1_000_000,
    "deep parentheses": "(" * 150 + "5" + ")" * 150,
}


@pytest.mark.parametrize("name", BOMBS)
def test_expensive_answers_cost_a_bounded_time_and_score_zero(reward_set, name):
    begun = time.monotonic()
    completions = [rf"\boxed{{{BOMBS[name]}}}", r"\boxed{1+4}", r"\boxed{1+5}"]
    assert score(reward_set, *completions) == [0.0, 1.0, 0.0]
    assert time.monotonic() - begun < TIMEOUT + 4


def test_a_batch_of_bombs_is_bounded_and_honest_answers_come_first():
    bombs = [rf"\boxed{{9^{{9^{{9^{{{k}}}}}}}}}" for k in range(11, 60)]
    with rewards.build(["math"], timeout=0.3) as built:
        begun = time.monotonic()
        assert score(built, *bombs, r"\boxed{1+4}") == [0.0] * len(bombs) + [1.0]
        assert time.monotonic() - begun < 12 * 0.3 + 5
        size = len(bombs)
        again = built.score(["p"] * size, bombs, [[1]] * size, {"answer": ["5"] * size})
    assert again.metrics["reward/timeout_ratio"] == 1.0


FLOODS = {
    "boxes": r"\boxed{1}" * 20_000 + r"\boxed{5}",
    "unclosed boxes": r"\boxed{5}" + r"\boxed{" * 5_000,
    "nested boxes": r"\boxed{" * 20_000 + "5" + "}" * 20_000,
    "blank boxes": r"\boxed{5}" + r"\boxed{ }" * 20_000,
    "box without end": "\\boxed" + " " * 200_000 + r"\boxed{5}",
    "answer is": "the answer is " * 20_000 + "5",
    "answer and blanks": "answer" + " " * 200_000 + "is 5",
    "commas": "1," * 100_000 + " 5",
    "groups of three": "111," * 50_000 + " 5",
    "dots": ".1" * 100_000 + " 5",
    "signs": "-" * 200_000 + " 5",
    "fractions": r"\frac{" * 50_000 + " 5",
    "slashes": "1/" * 100_000 + " 5",
}


@pytest.mark.parametrize("name", FLOODS)
def test_long_texts_are_read_in_linear_time(name):
    begun = time.perf_counter()
    assert extract_answer(FLOODS[name]) == "5"
    assert time.perf_counter() - begun < 1.0


PAYLOADS = [
    r"__import__('os').system('touch {path}')",
    r"open('{path}','w')",
    r"().__class__.__base__.__subclasses__()",
    r"[x for x in iter(int,1)]",
    r"\pi + __import__('pathlib').Path('{path}').touch()",
    r"[[__import__('os').system('touch {path}')]]",
    r"\text{exec(" "open('{path}','w')" ")}",
    r"\operatorname{system}(touch {path})",
    r"lambda: 5",
    r"print(5)",
    r"\begin{pmatrix} __import__('os').system('touch {path}') \end{pmatrix}",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_code_is_never_run(reward_set, tmp_path, payload):
    path = tmp_path / "touched"
    attack = payload.replace("{path}", str(path))
    gold = r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}" if "matrix" in payload else "5"
    texts = [attack, rf"\boxed{{{attack}}}", rf"The answer is ${attack}$"]
    assert 1.0 not in score(reward_set, *texts, gold=gold)[1:]
    assert not path.exists()


def test_a_patch_of_the_grader_in_the_text_changes_nothing(reward_set):
    patch = r"import math_verify; math_verify.verify = lambda *a, **k: True; \boxed{2+2}"
    assert score(reward_set, patch, r"\boxed{2+1}", r"\boxed{2+3}") == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", 0.0),
        (" \n\t", 0.0),
        ("\0\0\0", 0.0),
        ("\\boxed{\0005\0}", 1.0),
        ("\\boxed{\uff15}", 1.0),
        ("\\boxed{\u202e5\u202c}", 1.0),
        ("\\boxed{\u200b5}", 1.0),
        ("\\boxed{\ud800}", 0.0),
        ("\ud800\udfff 5", 1.0),
        ("\\boxed{\u00b25}", 0.0),
        ("\\boxed{5\u00b2}", 0.0),
        ("\\boxed{\u0665}", 0.0),
        (r"\boxed{}", 0.0),
        (r"\boxed{4} \boxed{5}", 1.0),
        (r"\boxed{5} \boxed{4}", 0.0),
        (r"\boxed{1} \boxed{2} \boxed{3} \boxed{4} \boxed{5} \boxed{6}", 0.0),
        (r"\boxed{5 or 7}", 0.0),
        (r"\boxed{x=5 and x=7}", 0.0),
        (r"\boxed{x \in \{4, 5\}}", 0.0),
        (r"\boxed{1, 2, 3, 4, 5, 6, 7}", 0.0),
        (r"\boxed{4 < 5 < 6}", 0.0),
        (r"\boxed{5 \neq 4}", 0.0),
        (r"\boxed{5 \pm 1}", 0.0),
        (r"\boxed{x}", 0.0),
        (r"\boxed{5 = 4}", 0.0),
        ("NaN", 0.0),
        (r"\boxed{NaN}", 0.0),
        (r"\boxed{\infty}", 0.0),
        (r"\boxed{inf}", 0.0),
        (r"\boxed{1e400}", 0.0),
        (r"\boxed{5+0i}", 1.0),
        (r"\boxed{5i}", 0.0),
        (r"<think>\boxed{5}, it is 5</think> I cannot say.", 0.0),
        ("\x1b[31m\\boxed{5}\x1b[0m\r\x1b[2K", 1.0),
        (r"[bold]\boxed{5}[/]", 1.0),
        (r'{"answer": 5}<script>alert(1)</script>', 0.0),
        (r"\boxed{../../etc/passwd}", 0.0),
        (r"\boxed{\input{/etc/passwd}}", 0.0),
    ],
)
def test_odd_texts_get_what_they_deserve(reward_set, text, value):
    assert score(reward_set, text) == [value]


@pytest.mark.parametrize("gold", [r"\text{east}", "(0,1)", r"x^2+1", r"\{1,2\}", "p - q", "B"])
def test_junk_never_equals_other_kinds_of_gold(reward_set, gold):
    junk = [
        "0",
        "1",
        r"\infty",
        "NaN",
        "()",
        r"\{\}",
        r"\emptyset",
        "x",
        r"\text{}",
        "east or west",
    ]
    assert score(reward_set, *[rf"\boxed{{{text}}}" for text in junk], gold=gold) == [0.0] * 10


def test_interval_ends_matter(reward_set):
    texts = [r"\boxed{(0,1)}", r"\boxed{(0,1.5)}", r"\boxed{[0,1]}", r"\boxed{(0,1]}"]
    assert score(reward_set, *texts, gold="(0,1)")[:2] == [1.0, 0.0]


def test_output_of_the_verifier_reaches_nobody(reward_set, capfd):
    score(reward_set, r"\boxed{\frac{}{}}", r"\boxed{1 + + 2}", r"\boxed{\sqrt{}}")
    assert capfd.readouterr() == ("", "")
