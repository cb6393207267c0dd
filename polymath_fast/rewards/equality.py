"""Equality of two written answers as far as strings and numbers decide it, in this process.

Everything here is linear in its input and never turns model text into code. What strings and
numbers cannot decide is left to math-verify in a process that can be killed.
"""

from __future__ import annotations

import math
import re

from polymath_fast.rewards import units
from polymath_fast.rewards.extraction import last_box, spell, tidy

MAX_CHARS, MAX_DIGITS, MAX_NESTING = 300, 200, 20
REL_TOLERANCE = 1e-4

_SPACING = re.compile(r"\\(?:left|right|displaystyle|limits|quad|qquad)(?![A-Za-z])|\\[!,;: ]|~")
_TIGHT_COMMA = re.compile(r"\{,\}|,\\!\s*")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\{([^{}]*)\}")
_UNIT_AFTER_NUMBER = re.compile(
    r"([0-9}])\s*\\(?:text|textbf|mathrm|mbox|operatorname)\{[^{}0-9]*(?:\^\{?[0-9]\}?)?[^{}0-9]*\}"
    r"(?:\^\{?-?[0-9]\}?)?$"
)
_UNIT_WORDS = rf"degrees?|percent|points?|units?|(?:square|cubic|sq) [a-z]+|{units.WORDS}"
_UNIT_WORD_AFTER_NUMBER = re.compile(
    rf"([0-9}}])\s+(?:{_UNIT_WORDS})(?:\s*(?:/|per)\s*(?:{_UNIT_WORDS}))?(?:\^\{{?-?[0-9]\}}?)?$"
)
_DEGREES = re.compile(r"\^\{?\s*\\circ\s*\}?|\\degree\b|\xb0|\\deg\b")
_SHORT_FRACTION = re.compile(r"\\frac\s*([0-9a-z])\s*([0-9a-z])|\\frac\s*([0-9a-z])\s*\{")
_HALF_SHORT_FRACTION = re.compile(r"\\frac\{([^{}]*)\}\s*([0-9a-z])")
_SHORT_ROOT = re.compile(r"\\sqrt\s*([0-9a-z])")
_MIXED = re.compile(
    r"([-+]?)([0-9]{1,15})(?:\s+([0-9]{1,15})/([0-9]{1,15})"
    r"|\s*\\frac\{([0-9]{1,15})\}\{([0-9]{1,15})\})"
)
_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_ASSIGNMENT = re.compile(r"[a-z]\w{0,2}(?:_\{?\w\}?)?(?:\([a-z]\))?=")
_DECIMAL = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_NUMBER = re.compile(
    rf"({_DECIMAL})(?:e([-+]?[0-9]{{1,3}})|(?:\\times|\\cdot|\*)10\^\{{?([-+]?[0-9]{{1,3}})\}}?)?"
)
_FRACTION = re.compile(
    rf"([-+]?)(?:\\frac\{{({_DECIMAL})\}}\{{({_DECIMAL})\}}|({_DECIMAL})/({_DECIMAL}))"
)
_WHOLE = re.compile(r"[-+]?[0-9]+(?:\.0*)?")


def unwrap(text: str) -> str:
    """`text` without surrounding blanks, box and math delimiters; its characters made ASCII."""
    text = spell(tidy(text)).strip()
    if "\\boxed" in text or "\\fbox" in text:
        text = last_box(text) or text
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right):
            text = text[len(left) : -len(right)].strip()
    # "$69$, $84$": each item delimited on its own
    return text if "\\$" in text else text.replace("$", "")


def normalise(answer: str) -> str:
    """`answer` with spelling that carries no value removed:
    spacing, delimiters, units after a number, thousands separators, short fractions, mixed numbers,
    case."""
    text = unwrap(answer).rstrip(".,; ")
    text = text.replace(r"\$", "").replace("$", "").replace("\\dfrac", "\\frac")
    text = text.replace("\\tfrac", "\\frac").replace("\\%", "%")
    text = _SPACING.sub(" ", _TIGHT_COMMA.sub(",", text)).strip()
    text = _DEGREES.sub("", text).strip()
    text = _UNIT_AFTER_NUMBER.sub(r"\1", text)
    text = _WRAPPED.sub(r"\1", text).strip()
    text = _UNIT_WORD_AFTER_NUMBER.sub(r"\1", text)
    text = _SHORT_FRACTION.sub(_spell_fraction, text)
    text = _HALF_SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    text = _MIXED.sub(_improper, text) if _MIXED.fullmatch(text) else text
    return "".join(text.split()).rstrip(".").casefold()


def _without_wrapping(answer: str) -> str:
    """`answer` with its units as bare words."""
    text = _SPACING.sub(" ", _TIGHT_COMMA.sub(",", unwrap(answer).rstrip(".,; ")))
    return _WRAPPED.sub(r" \1 ", text)


def _spell_fraction(match: re.Match[str]) -> str:
    if match.group(3) is not None:
        return f"\\frac{{{match.group(3)}}}{{"
    return f"\\frac{{{match.group(1)}}}{{{match.group(2)}}}"


def _improper(match: re.Match[str]) -> str:
    """One and a half is three halves."""
    sign, whole = match.group(1), int(match.group(2))
    top, bottom = (int(match.group(i) or match.group(i + 2)) for i in (3, 4))
    return f"{sign}\\frac{{{whole * bottom + top}}}{{{bottom}}}"


def number(text: str) -> float | None:
    """Value of a normalised decimal, scientific or fractional number; None for anything else."""
    match = _NUMBER.fullmatch(text)
    if match:
        value = float(f"{match.group(1)}e{match.group(2) or match.group(3) or 0}")
        return value if math.isfinite(value) else None
    match = _FRACTION.fullmatch(text)
    if not match:
        return None
    top, bottom = (float(match.group(i) or match.group(i + 2)) for i in (2, 3))
    if bottom == 0 or not math.isfinite(top) or not math.isfinite(bottom):
        return None
    return (-1.0 if match.group(1) == "-" else 1.0) * top / bottom


def numbers_equal(answer: str, gold: str) -> bool | None:
    """Equality of two normalised numbers, or None when one of them is no plain number.

    Whole numbers must be the same; others agree within a relative 1e-4. A percentage equals both
    the bare number and its hundredth.
    """
    a, b = number(answer.rstrip("%")), number(gold.rstrip("%"))
    if a is None or b is None:
        return None
    if answer.endswith("%") != gold.endswith("%"):
        share, bare = (a, b) if answer.endswith("%") else (b, a)
        return _close(share, bare) or _close(share / 100, bare)
    if _WHOLE.fullmatch(answer) and _WHOLE.fullmatch(gold):
        return _digits(answer) == _digits(gold)
    return _close(a, b)


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=REL_TOLERANCE)


def _digits(whole: str) -> str:
    """Canonical spelling of a whole number; text, because int() refuses very long ones."""
    digits = whole.partition(".")[0].lstrip("+-").lstrip("0") or "0"
    return f"-{digits}" if whole.startswith("-") and digits != "0" else digits


def settle(answer: str, gold: str) -> bool | None:
    """Whether `answer` equals `gold` by normalised string, then by number; None when only
    symbolic verification can tell."""
    if answer.strip() == gold.strip():
        return True
    if max(len(answer), len(gold)) > max(MAX_CHARS, 2 * len(gold)):
        return False
    a, b = normalise(answer), normalise(gold)
    if not a or units.differ(_without_wrapping(answer), _without_wrapping(gold)):
        return False
    if ("=" in a) != ("=" in b):
        a, b = _ASSIGNMENT.sub("", a, count=1), _ASSIGNMENT.sub("", b, count=1)
    if a == b:
        return True
    equal = numbers_equal(a, b)
    if equal is None and not (verifiable(answer) and verifiable(gold)):
        return False
    return equal


def verifiable(answer: str) -> bool:
    """Whether symbolic verification may be tried: short, shallow and without giant numbers."""
    depth = deepest = 0
    for character in answer:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    digits = sum(character.isdigit() for character in answer)
    return len(answer) <= MAX_CHARS and digits <= MAX_DIGITS and deepest <= MAX_NESTING
