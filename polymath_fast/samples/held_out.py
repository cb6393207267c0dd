"""Makes the held-out problems of the shipped sample `rectangle`: other products of two numbers.

python -m polymath_fast.samples.held_out [FILE] writes the file that ships with the package. No
problem shares a number, or the product, with the training sample, so a right answer was not
memorised.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from polymath_fast.samples.sources import SHIPPED

TRAINED = (24, 15)
COUNT = 60
_SEED = 20250
_WORDINGS = (
    "A rectangle has a length of {a} and a width of {b}. What is its area?",
    "A rectangular garden is {a} metres long and {b} metres wide. What is its area?",
    "What is {a} times {b}?",
    "A box holds {a} rows of {b} eggs. How many eggs does it hold?",
    "A ticket costs {a} dollars. How much do {b} tickets cost?",
    "A floor is {a} tiles long and {b} tiles wide. How many tiles does it have?",
)


def problems() -> list[dict[str, str]]:
    """The held-out problems, always the same: one half two digits times one (11..40 by 3..9), the
    other half tens times teens. Products of a size that a small model gets right now and then."""
    generator = random.Random(_SEED)
    kinds = (
        [(a, b) for a in range(11, 41) for b in range(3, 10)],
        [(a, b) for a in range(10, 60, 10) for b in range(11, 20)],
    )
    chosen = [generator.sample(list(filter(_is_new, pairs)), COUNT // 2) for pairs in kinds]
    rows = []
    for number, (a, b) in enumerate(chosen[0] + chosen[1]):
        wording = _WORDINGS[number % len(_WORDINGS)]
        rows.append({"problem": wording.format(a=a, b=b), "answer": str(a * b)})
    return rows


def _is_new(pair: tuple[int, int]) -> bool:
    a, b = pair
    return not {a, b} & set(TRAINED) and a * b != TRAINED[0] * TRAINED[1]


def render() -> str:
    """The problems as the text of a jsonl file."""
    return "".join(json.dumps(row) + "\n" for row in problems())


def main(args: list[str]) -> None:
    """Write the file to the path in `args`, or to its place in the package."""
    path = Path(args[0]) if args else SHIPPED / "rectangle_held_out.jsonl"
    path.write_text(render(), encoding="utf-8")
    print(f"wrote {COUNT} problems to {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
