"""mean@k and pass@k from graded completions, with intervals that respect who shares a problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

Z_95 = 1.959964
INTERVAL = (
    "95 % Wilson interval at the effective sample size, in which completions of one problem count "
    "as one draw as far as they agree"
)


@dataclass(frozen=True)
class Estimate:
    """A share in [0, 1] with its 95 % interval over the draw of problems."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


def pass_at_k(num_completions: int, num_right: int, k: int) -> float:
    """Probability that k of the completions, drawn without putting back, hold a right one.

    Unbiased for k <= num_completions: 1 - C(n - c, k) / C(n, k) (Chen et al., arXiv 2107.03374).
    """
    if not 1 <= k <= num_completions:
        raise ValueError(f"pass@{k} needs at least {k} completions, there are {num_completions}")
    wrong = num_completions - num_right
    return 1.0 - math.comb(wrong, k) / math.comb(num_completions, k)


def wilson(share: float, size: float) -> tuple[float, float]:
    """95 % score interval of `share` seen in `size` independent draws (Wilson 1927)."""
    z2 = Z_95**2
    middle = (share + z2 / (2 * size)) / (1 + z2 / size)
    half = Z_95 / (1 + z2 / size) * math.sqrt(share * (1 - share) / size + z2 / (4 * size**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def estimate(per_problem: Sequence[float], completions_per_problem: int) -> Estimate:
    """Mean of one share per problem, with its interval.

    Problems are the independent draws; completions of one problem are not. The Wilson interval is
    therefore taken at the effective size p (1 - p) / variance of the mean (Korn and Graubard 1998),
    between the number of problems and the number of completions. With one completion per problem it
    is the plain Wilson interval, and unlike a normal one it has a width at 0 % and 100 % too.
    """
    problems = len(per_problem)
    share = fmean(per_problem)
    spread = share * (1 - share)
    variance = fmean((value - share) ** 2 for value in per_problem) / problems
    largest = problems * completions_per_problem
    if spread == 0:
        size = float(problems)
    else:
        size = largest if variance == 0 else min(largest, max(problems, spread / variance))
    return Estimate(share, *wilson(share, size))
