"""Samples that are shipped and their held-out problems: right, disjoint, as they are generated."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from polymath_fast.samples import held_out, sources


def test_shipped_samples_are_right() -> None:
    rows = {row["name"]: row for _, row in sources.read_rows("shipped:rectangle", "train")}
    assert rows["rectangle"]["answer"] == str(24 * 15)
    (_, turbine) = next(iter(sources.read_rows("shipped:turbine", "train")))
    constant = Fraction(1296, 12 * 6**3)
    assert constant * 5 * int(turbine["answer"]) ** 3 == 4320
    (_, prime) = next(iter(sources.read_rows("shipped:prime", "train")))
    glucose = Fraction(3, 1000) / (6 * 12 + 12 * 1 + 6 * 16)
    work = Fraction(40, 100) * 50_000 * 30 * glucose
    assert int(prime["answer"]) == work / (Fraction(20, 1000) * 10)


def test_the_held_out_file_is_what_its_generator_makes(tmp_path: Path) -> None:
    held_out.main([str(tmp_path / "again.jsonl")])
    shipped = sources.SHIPPED / "rectangle_held_out.jsonl"
    assert (tmp_path / "again.jsonl").read_bytes() == shipped.read_bytes()


def test_held_out_problems_are_right_and_disjoint_from_the_training_problem() -> None:
    rows = [row for _, row in sources.read_rows("shipped:rectangle_held_out", "train")]
    assert 40 <= len(rows) <= 100
    assert len({row["problem"] for row in rows}) == len(rows)
    wordings = set()
    for row in rows:
        numbers = [
            int(word) for word in "".join(c if c.isdigit() else " " for c in row["problem"]).split()
        ]
        assert len(numbers) == 2 and numbers[0] * numbers[1] == int(row["answer"])
        assert not {*numbers} & {24, 15} and row["answer"] != "360"
        wordings.add("".join(c for c in row["problem"] if not c.isdigit()))
    assert len(wordings) >= 5


def test_held_out_problems_belong_to_their_sample() -> None:
    assert sources.held_out("shipped:rectangle") == "shipped:rectangle_held_out"
    assert sources.held_out("shipped:turbine") is None
    assert sources.held_out("rectangle") is None
    assert sources.held_out(None) is None
