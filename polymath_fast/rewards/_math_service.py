"""Symbolic equality, served inside a worker process. Only text comes in, only a word goes out:
sympy objects of hostile answers hang in str(), repr() and pickling as well."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from polymath_fast.rewards.equality import REL_TOLERANCE, number

# The expression parser of math-verify evaluates Python; the LaTeX parser does not.
_LATEX_ONLY = (LatexExtractionConfig(),)


def start(options: dict[str, Any]) -> tuple[Callable[[dict[str, str]], str], str]:
    """Warms the LaTeX parser up, so that the first request does not pay for its tables."""
    answer_equals_gold(r"\frac{1}{2}", r"2^{-1}")
    return _handle, "ready"


def _handle(request: dict[str, str]) -> str:
    try:
        return "equal" if answer_equals_gold(request["answer"], request["gold"]) else "different"
    except MemoryError:
        return "memory"
    except Exception:
        # math-verify and sympy raise anything at all on nonsense; nonsense equals nothing
        return "different"


@lru_cache(maxsize=256)
def _parse_gold(gold: str) -> list[Any]:
    return _parse(gold)


def _parse(text: str) -> list[Any]:
    return parse(
        rf"\boxed{{{text}}}",
        extraction_config=_LATEX_ONLY,
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )


def answer_equals_gold(answer: str, gold: str) -> bool:
    """math-verify's verdict, or agreement within a relative 1e-4 of two constants neither of which
    is meant to be exact."""
    expected, given = _parse_gold(gold), _parse(answer)
    if not expected or not given:
        return False
    if verify(expected, given, timeout_seconds=None):
        return True
    is_exact = number(gold.strip()) is not None and "." not in gold
    return not is_exact and _close_constants(expected[0], given[0])


def _close_constants(gold: Any, answer: Any) -> bool:
    if not (getattr(gold, "is_number", False) and getattr(answer, "is_number", False)):
        return False
    a, b = complex(gold.evalf(15)), complex(answer.evalf(15))
    return all(
        math.isclose(x, y, rel_tol=REL_TOLERANCE, abs_tol=1e-12)
        for x, y in ((a.real, b.real), (a.imag, b.imag))
    )
