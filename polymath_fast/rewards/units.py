"""Units behind the number of an answer: how large they are, so that 12 m is not taken for 12 cm."""

from __future__ import annotations

import math
import re

Size = tuple[float, tuple[int, ...]]
"""in SI units, and the powers of length, mass, time, current, temperature, amount and money"""

_NONE, _LENGTH, _VOLUME = (0,) * 7, (1, 0, 0, 0, 0, 0, 0), (3, 0, 0, 0, 0, 0, 0)
_MASS, _TIME, _MONEY = (0, 1, 0, 0, 0, 0, 0), (0, 0, 1, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0, 1)
_DAY = 86400.0
_YEAR = 365.25 * _DAY
_SPELLINGS: dict[str, Size] = {
    "m meter metre": (1.0, _LENGTH),
    "km kilometer kilometre": (1e3, _LENGTH),
    "cm centimeter centimetre": (1e-2, _LENGTH),
    "mm millimeter millimetre": (1e-3, _LENGTH),
    "in inch inches": (0.0254, _LENGTH),
    "ft foot feet": (0.3048, _LENGTH),
    "yd yard": (0.9144, _LENGTH),
    "mi mile": (1609.344, _LENGTH),
    "kg kilogram": (1.0, _MASS),
    "g gram": (1e-3, _MASS),
    "mg milligram": (1e-6, _MASS),
    "lb lbs pound": (0.45359237, _MASS),
    "oz ounce": (0.45359237 / 16, _MASS),
    "s sec second": (1.0, _TIME),
    "ms millisecond": (1e-3, _TIME),
    "min minute": (60.0, _TIME),
    "h hr hrs hour": (3600.0, _TIME),
    "day": (_DAY, _TIME),
    "week": (7 * _DAY, _TIME),
    "month": (_YEAR / 12, _TIME),
    "year": (_YEAR, _TIME),
    "l L liter litre": (1e-3, _VOLUME),
    "ml mL milliliter millilitre": (1e-6, _VOLUME),
    "gal gallon": (3.785411784e-3, _VOLUME),
    "dollar": (1.0, _MONEY),
    "cent": (0.01, _MONEY),
    "mph": (0.44704, (1, 0, -1, 0, 0, 0, 0)),
    "kph": (1 / 3.6, (1, 0, -1, 0, 0, 0, 0)),
    "K": (1.0, (0, 0, 0, 0, 1, 0, 0)),
    "mol mole": (1.0, (0, 0, 0, 0, 0, 1, 0)),
    "M": (1e3, (-3, 0, 0, 0, 0, 1, 0)),
    "N": (1.0, (1, 1, -2, 0, 0, 0, 0)),
    "atm": (101325.0, (-1, 1, -2, 0, 0, 0, 0)),
}
_WITH_PREFIXES: dict[str, Size] = {
    "Hz": (1.0, (0, 0, -1, 0, 0, 0, 0)),
    "J": (1.0, (2, 1, -2, 0, 0, 0, 0)),
    "W": (1.0, (2, 1, -3, 0, 0, 0, 0)),
    "eV": (1.602176634e-19, (2, 1, -2, 0, 0, 0, 0)),
    "V": (1.0, (2, 1, -3, -1, 0, 0, 0)),
    "A": (1.0, (0, 0, 0, 1, 0, 0, 0)),
    "Pa": (1.0, (-1, 1, -2, 0, 0, 0, 0)),
}
_PREFIXES = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6}
_UNITS = {word: size for words, size in _SPELLINGS.items() for word in words.split()} | {
    prefix + unit: (factor * size, powers)
    for unit, (size, powers) in _WITH_PREFIXES.items()
    for prefix, factor in _PREFIXES.items()
}
_AREAS = {"square": 2, "sq": 2, "cubic": 3}

WORDS = "|".join(rf"{word}s?" if len(word) > 2 else word for word in _UNITS)
"""alternatives of a pattern, without groups"""

# one quantity: without letters but for LaTeX commands, with no comma but between thousands
_QUANTITY = re.compile(
    r"(?:[A-Za-z]\w{0,2} ?= ?)?(?P<dollar>\\\$)? ?"
    r"(?:[0-9.+*/(){}^ -]|,(?=[0-9]{3})|\\[A-Za-z]+)*(?:[0-9})]|\\pi) ?"
    r"(?P<unit>[A-Za-z][A-Za-z0-9 ^{}/*.\\-]*)?"
)
_FACTOR = re.compile(r"(?:(square|sq|cubic) )?([A-Za-z]+)(?: ?\^ ?(?:\{(-?[0-9])\}|(-?[0-9])))?")
_BETWEEN = re.compile(r" ?(/|per\b|\\cdot\b|\*) ?")


def differ(answer: str, gold: str) -> bool:
    """Whether both are one quantity with a known unit, and their units are not equally large.

    >>> differ("12 m", "12 cm"), differ("3 m/s", "3 meters per second"), differ("12 m", "12")
    (True, False, False)
    """
    a, b = size_of(answer), size_of(gold)
    if a is None or b is None:
        return False
    return a[1] != b[1] or not math.isclose(a[0], b[0], rel_tol=1e-6)


def size_of(text: str) -> Size | None:
    """The size of the unit behind the number in `text`; None where there is none, or more than one
    quantity, or a unit that is not known. `text` holds no text commands like "text"."""
    found = _QUANTITY.fullmatch(" ".join(text.split()))
    if found is None:
        return None
    if found["unit"] is None:
        return _UNITS["dollar"] if found["dollar"] else None
    return None if found["dollar"] else _product(found["unit"].strip())


def _product(unit: str) -> Size | None:
    """Of kg*m/s^2 and the like; what follows a slash or "per" divides."""
    total, powers, place, sign = 1.0, _NONE, 0, 1
    while True:
        factor = _FACTOR.match(unit, place)
        known = factor and _lookup(factor[2])
        if not factor or known is None:
            return None
        power = sign * _AREAS.get(factor[1] or "", 1) * int(factor[3] or factor[4] or 1)
        total *= known[0] ** power
        powers = tuple(p + power * q for p, q in zip(powers, known[1], strict=True))
        place = factor.end()
        if place == len(unit):
            return total, powers
        between = _BETWEEN.match(unit, place)
        if between is None:
            return None
        if between[1] in ("/", "per"):
            sign = -1
        elif sign < 0:  # J/kg*K: nobody knows what the last one does
            return None
        place = between.end()


def _lookup(word: str) -> Size | None:
    word = word.casefold() if len(word) > 3 else word
    plural = word[:-1] if len(word) > 3 and word.endswith("s") else word
    return _UNITS.get(word, _UNITS.get(plural))
